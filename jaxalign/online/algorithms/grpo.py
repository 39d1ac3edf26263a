"""The GRPO family: clipped policy gradients on a reward, compared within groups, without a critic.

Ratios are to the policy before the updates of a rollout. Where top-k, top-p or min-p truncate the
sampled distribution, each token is weighed by its probability under the policy over that under the
sampled distribution.
"""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from jaxalign import losses
from jaxalign.errors import UserError
from jaxalign.losses import SampleLogProbs, group_advantages, ppo_policy, reinforce_pp_advantages
from jaxalign.losses.checks import Strength
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rollouts import Rollout, by_row


def group_policy_gradient(
    loss: Callable[..., Array],
    *,
    samples: int,
    updates: int,
    minibatches: int,
    scaled: bool = True,
    per_token: bool = False,
    by_length: bool = False,
    resamples: int = 0,
    overlong: float = 0.0,
) -> Algorithm:
    """A loss on rewards relative to the mean of their group, the responses to one prompt.

    Args:
      loss: (samples, old log-probs, advantages, importance) -> a value per row, or per token.
      samples: size of a group, at least 2.
      updates: number of passes over each rollout.
      minibatches: number of parts of a rollout, with one update each.
      scaled: whether advantages are divided by their group's standard deviation.
      per_token: whether the loss has a value per token, averaged over the tokens of a batch.
      by_length: whether the loss also reads `max_tokens`.
      resamples: as in `Algorithm`.
      overlong: as in `Algorithm`.
    """
    if samples < 2:
        raise UserError(f"samples: {samples} response to a prompt is no group; use 2 or more")
    on_policy = updates * minibatches == 1

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        batch, rows = rollout.batch, rollout.samples()
        if on_policy:  # all ratios are 1, whatever the precision of the sampler
            old = jax.lax.stop_gradient(rows.log_prob)
        else:
            assert batch.sampled_log_prob is not None
            old = by_row(batch.sampled_log_prob)
        advantages = by_row(group_advantages(batch.reward, scaled=scaled))
        weights = None if batch.importance is None else by_row(batch.importance)
        options = {"max_tokens": rollout.longest} if by_length else {}
        values = loss(rows, old, advantages, weights, **options)
        if per_token:
            return values.reshape(len(batch.reward), -1).sum(-1)
        return values.reshape(batch.reward.shape).mean(-1)

    return Algorithm(
        draws=(Draw(),) * samples,
        loss=of_rollout,
        annotation="rewards",
        trained=samples,
        updates=updates,
        minibatches=minibatches,
        per_token=per_token,
        rescored=not on_policy,
        importance=True,
        resamples=resamples,
        overlong=overlong,
    )


def grpo(
    *,
    beta: Strength = 0.04,
    clip: float = 0.2,
    clip_high: float = 0.2,
    samples: int = 8,
    updates: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300).

    Args:
      beta: weight of the divergence from the reference. Default 0.04: the paper's.
      clip: how far a token's probability may fall. Default 0.2: TRL's.
      clip_high: how far it may rise. Default 0.2: TRL's.
      samples: size of a group. Default 8: TRL's; 2 is 2-GRPO (arXiv:2510.00977).
      updates: number of passes over each rollout. Default 1: the paper's.
      minibatches: number of parts of a rollout, with one update each. Default 1.
    """
    loss = partial(losses.grpo, beta=beta, clip=clip, clip_high=clip_high)
    return group_policy_gradient(loss, samples=samples, updates=updates, minibatches=minibatches)


def dr_grpo(
    *,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_high: float = 0.2,
    samples: int = 8,
    updates: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """GRPO without its biases to length and difficulty (Liu et al., 2025, arXiv:2503.20783).

    Advantages are not divided by the group's standard deviation, and a response's sum over tokens
    is divided by the longest length.

    Args:
      beta: weight of the divergence from the reference. Default 0: the paper's.
      clip: how far a token's probability may fall. Default 0.2: the paper's.
      clip_high: how far it may rise. Default 0.2: the paper's.
      samples: size of a group. Default 8: the paper's.
      updates: number of passes over each rollout. Default 1: the paper's.
      minibatches: number of parts of a rollout, with one update each. Default 1.
    """
    return group_policy_gradient(
        partial(losses.dr_grpo, beta=beta, clip=clip, clip_high=clip_high),
        samples=samples,
        updates=updates,
        minibatches=minibatches,
        scaled=False,
        by_length=True,
    )


def dapo(
    *,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_high: float = 0.28,
    overlong: float = 0.2,
    resamples: int = 3,
    samples: int = 16,
    updates: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """DAPO: a higher upper clip, dynamic sampling and a soft penalty on length (arXiv:2503.14476).

    Prompts whose responses all have the same reward are sampled again, and have no weight if that
    does not help; the paper samples other prompts in their place. All tokens of a batch weigh the
    same.

    Args:
      beta: weight of the divergence from the reference. Default 0: the paper's.
      clip: how far a token's probability may fall. Default 0.2: the paper's.
      clip_high: how far it may rise. Default 0.28: the paper's.
      overlong: fraction of the longest length within which a penalty grows to 1. Default 0.2: the
        paper's 4,096 of 20,480 tokens; 0: no penalty.
      resamples: largest number of further draws. Default 3; 0: no dynamic sampling.
      samples: size of a group. Default 16: the paper's.
      updates: number of passes over each rollout. Default 1.
      minibatches: number of parts of a rollout, with one update each. Default 1; the paper's is 16.
    """
    return group_policy_gradient(
        partial(losses.dapo, beta=beta, clip=clip, clip_high=clip_high),
        samples=samples,
        updates=updates,
        minibatches=minibatches,
        per_token=True,
        resamples=resamples,
        overlong=overlong,
    )


def gspo(
    *,
    beta: float = 0.0,
    clip: float = 3e-4,
    clip_high: float = 4e-4,
    samples: int = 8,
    updates: int = 1,
    minibatches: int = 4,
) -> Algorithm:
    """GSPO: GRPO with one ratio for a whole response (Zheng et al., 2025, arXiv:2507.18071).

    Args:
      beta: weight of the divergence from the reference. Default 0: the paper's.
      clip: how far a response's ratio may fall. Default 3e-4: the paper's.
      clip_high: how far it may rise. Default 4e-4: the paper's.
      samples: size of a group. Default 8: TRL's.
      updates: number of passes over each rollout. Default 1: the paper's.
      minibatches: number of parts of a rollout, with one update each. Default 4: the paper's.
    """
    loss = partial(losses.gspo, beta=beta, clip=clip, clip_high=clip_high)
    return group_policy_gradient(loss, samples=samples, updates=updates, minibatches=minibatches)


def cispo(
    *,
    beta: float = 0.0,
    clip_high: float = 4.0,
    samples: int = 8,
    updates: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """CISPO: clipped weights instead of clipped tokens (MiniMax, 2025, arXiv:2506.13585).

    Args:
      beta: weight of the divergence from the reference. Default 0: the paper's.
      clip_high: how far a token's weight may rise above 1. Default 4: ScaleRL's
        (arXiv:2510.13786).
      samples: size of a group. Default 8: TRL's.
      updates: number of passes over each rollout. Default 1.
      minibatches: number of parts of a rollout, with one update each. Default 1.
    """
    return group_policy_gradient(
        partial(losses.cispo, beta=beta, clip_high=clip_high),
        samples=samples,
        updates=updates,
        minibatches=minibatches,
        per_token=True,
    )


def reinforce_pp(
    *,
    kl_penalty: float = 0.01,
    clip: float = 0.2,
    samples: int = 1,
    updates: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """REINFORCE++: PPO's clip without critic; advantages are whitened over the whole rollout.

    Hu et al., 2025, arXiv:2501.03262.

    Args:
      kl_penalty: weight of the divergence from the reference in the rewards. Default 0.01: the
        authors' code.
      clip: how far a token's probability may move. Default 0.2: the authors' code.
      samples: number of responses to each prompt. Default 1: the paper's.
      updates: number of passes over each rollout. Default 1: the authors' code.
      minibatches: number of parts of a rollout, with one update each. Default 1.
    """

    def advantages(
        rows: SampleLogProbs, reward: Float[Array, " rows"], values: Array
    ) -> tuple[Array, Array]:
        found = reinforce_pp_advantages(rows, reward, beta=kl_penalty)
        return found, values

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        batch, rows = rollout.batch, rollout.samples()
        assert batch.advantage is not None
        assert batch.sampled_log_prob is not None
        old, advantage = by_row(batch.sampled_log_prob), by_row(batch.advantage)
        if batch.importance is not None:
            advantage = advantage * by_row(batch.importance)
        tokens = ppo_policy(rows.log_prob, old, advantage, rows.mask, clip=clip)
        return tokens.reshape(len(batch.reward), -1).sum(-1)

    return Algorithm(
        draws=(Draw(),) * samples,
        loss=of_rollout,
        annotation="rewards",
        trained=samples,
        updates=updates,
        minibatches=minibatches,
        per_token=True,
        advantages=advantages,
        critic=False,
        importance=True,
    )
