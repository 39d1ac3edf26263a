"""Policy gradients on a reward: the regularised one, and RLOO."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses import regularised_policy_gradient as loss
from jaxalign.losses.checks import Strength
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rollouts import Rollout


def regularised_policy_gradient(*, tau: Strength = 0.05, samples: int = 1) -> Algorithm:
    """The reward-model baseline of the IPO-MD paper: a policy gradient without critic.

    The baseline of a reward is the mean over the batch's other responses; with two or more
    responses to a prompt, over the other responses to the same prompt.

    Args:
      tau: strength of the regularisation to the reference. Default 0.05: the paper's choice.
      samples: number of responses to each prompt. Default 1.
    """

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        batch = rollout.batch
        values = [
            loss(rollout.sample(i), batch.reward[:, i], batch.baseline[:, i], tau=tau)
            for i in range(samples)
        ]
        return jnp.mean(jnp.stack(values), axis=0)

    return Algorithm(
        draws=(Draw(),) * samples, loss=of_rollout, annotation="rewards", trained=samples
    )


def rloo(*, tau: Strength = 0.05, samples: int = 2) -> Algorithm:
    """REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, arXiv:2402.14740).

    Args:
      tau: strength of the regularisation to the reference. Default 0.05: TRL's.
      samples: number of responses to each prompt, at least 2. Default 2: TRL's.
    """
    if samples < 2:
        raise UserError(f"samples: {samples} response to a prompt leaves no others; use 2 or more")
    return regularised_policy_gradient(tau=tau, samples=samples)
