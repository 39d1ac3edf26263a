"""Exploratory preference optimisation (Xie et al., 2024, arXiv:2405.21046)."""

from jaxtyping import Array, Float

from jaxalign.losses import xpo as loss
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rollouts import Rollout


def xpo(*, beta: float = 0.1, alpha: float = 1e-5) -> Algorithm:
    """Online DPO between a sample of the policy and one of the reference, with optimism.

    Args:
      beta: inverse temperature. Default 0.1: TRL's.
      alpha: weight of the optimism. Default 1e-5: TRL's.
    """

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        preference = rollout.batch.preference[:, 0, 1]
        return loss(rollout.pair(0, 1), preference, beta=beta, alpha=alpha)

    return Algorithm(
        draws=(Draw(), Draw(policy=0.0, reference=1.0)),
        loss=of_rollout,
        annotation="preferences",
        trained=2,
    )
