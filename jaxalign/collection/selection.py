"""Selection of responses by their rewards; pure functions of arrays."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float64

from jaxalign.errors import UserError

Rewards = Float64[np.ndarray, " responses"]


def best_and_worst(rewards: Rewards) -> tuple[int, int] | None:
    """Indices of the best and the worst response, the first of ties; None if all are equal.

    Args:
      rewards: rewards of the responses to one prompt.
    """
    best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
    return None if rewards[best] == rewards[worst] else (best, worst)


def ranked_pairs(rewards: Rewards) -> list[tuple[int, int]]:
    """All (better, worse) pairs, as RRHF's ranking loss reads them.

    Args:
      rewards: rewards of the responses to one prompt.

    References:
      Yuan et al. 2023, arXiv:2304.05302.
    """
    order = range(len(rewards))
    return [(i, j) for i in order for j in order if rewards[i] > rewards[j]]


def raft_selection(
    rewards: Float64[np.ndarray, "prompts responses"],
    *,
    keep: float = 0.2,
    ranking: Literal["local", "top"] = "local",
) -> list[tuple[int, int]]:
    """Indices (prompt, response) of the responses that RAFT imitates, in order.

    Args:
      rewards: reward of each response to each prompt.
      keep: fraction that is kept, rounded up.
      ranking: "local" ranks the responses to each prompt, "top" ranks all of them together.

    Raises:
      UserError: `keep` is not in (0, 1].

    References:
      Dong et al. 2023, arXiv:2304.06767, section 3; 0.2 is LMFlow's.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep: {keep} is not in (0, 1]")
    prompts, responses = rewards.shape
    if ranking == "top":
        number = math.ceil(keep * rewards.size)
        chosen = np.argsort(-rewards, axis=None, kind="stable")[:number]
        return sorted((int(at) // responses, int(at) % responses) for at in chosen)
    number = math.ceil(keep * responses)
    order = np.sort(np.argsort(-rewards, axis=1, kind="stable")[:, :number], axis=1)
    return [(prompt, int(at)) for prompt in range(prompts) for at in order[prompt]]


def rejection_sampling(
    rewards: Rewards, *, beta: float, number: int, rng: np.random.Generator
) -> list[int]:
    r"""Responses accepted as if drawn from the optimal policy of the reward.

    .. math:: P(\text{accept } y) = \exp\left(\frac{r(y) - r_{max}}{\beta}\right)

    r_max is the largest reward among the responses not accepted yet; passes over them are repeated
    until enough are accepted.

    Args:
      rewards: rewards of the responses to one prompt, drawn from the policy.
      beta: coefficient of the KL term; a small one accepts nearly the best responses only.
      number: number of responses to accept, at most all.
      rng: generator of the draws.

    Raises:
      UserError: `beta` is not positive.

    References:
      Liu et al. 2023, arXiv:2309.06657, section 3.2 and algorithm 1.
    """
    if beta <= 0:
        raise UserError(f"beta: {beta} is not positive")
    left, accepted = list(range(len(rewards))), []
    while len(accepted) < min(number, len(rewards)):
        most = max(rewards[at] for at in left)
        for at in list(left):
            if rng.uniform() < math.exp((rewards[at] - most) / beta):
                accepted.append(at)
                left.remove(at)
                if len(accepted) == number:
                    break
    return accepted
