"""Self-play fine-tuning in iterations (Chen et al., 2024, arXiv:2401.01335)."""

from jaxtyping import Array, Float

from jaxalign.losses import dpo
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rollouts import Rollout


def spin(*, beta: float = 0.1, iteration: int = 1563) -> Algorithm:
    r"""DPO between the data's response and one of the policy that began the iteration.

    .. math:: \ell = -\log\sigma\Bigl(\beta \log\frac{\pi(y)}{\pi_t(y)}
              - \beta \log\frac{\pi(y')}{\pi_t(y')}\Bigr), \quad
              y \sim \text{data}, \quad y' \sim \pi_t

    There is no annotation. A policy with the distribution of the data is a fixed point.

    Args:
      beta: inverse temperature. Default 0.1: the paper's.
      iteration: rollouts after which pi_t is set to the current policy. Default 1563: the
        paper's two epochs of 50,000 prompts in batches of 64.
    """

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        return dpo(rollout.pair(0, 1), beta=beta)

    return Algorithm(
        draws=(Draw(policy=0.0, from_data=True), Draw(policy=0.0, previous=1.0)),
        loss=of_rollout,
        annotation="none",
        trained=2,
        iteration=iteration,
    )
