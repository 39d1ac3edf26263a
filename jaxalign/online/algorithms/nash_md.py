"""Nash-MD-PG and its ends: policy gradients on preferences over an opponent's responses.

Munos et al., 2023, arXiv:2312.00886, section 7.
"""

from jaxtyping import Array, Float

from jaxalign.losses import nash_md_pg as loss
from jaxalign.losses.checks import Strength
from jaxalign.online.algorithm import Algorithm, Draw, mixture_with_reference
from jaxalign.online.rollouts import Rollout


def against(opponent: Draw, tau: Strength, average_decay: float | None = None) -> Algorithm:
    """A policy gradient on the probability of beating an opponent.

    Args:
      opponent: source of the responses to compare with.
      tau: strength of the regularisation to the reference.
      average_decay: as in `Algorithm`.
    """

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        return loss(rollout.sample(0), rollout.batch.preference[:, 0, 1], tau=tau)

    return Algorithm(
        draws=(Draw(), opponent),
        loss=of_rollout,
        annotation="preferences",
        trained=1,
        average_decay=average_decay,
    )


def nash_md_pg(*, tau: Strength = 0.008, beta: float = 0.125) -> Algorithm:
    """Nash-MD-PG: the opponent is the geometric mixture of policy and reference.

    Args:
      tau: strength of the regularisation to the reference. Default 0.008: the paper's.
      beta: weight of the reference in the opponent. Default 0.125: the paper's best; 0 is
        self-play, 1 a best response to the reference.
    """
    return against(mixture_with_reference(beta), tau)


def self_play_pg(*, tau: Strength = 0.008) -> Algorithm:
    """Self-play: the opponent is the policy itself; in expectation online IPO's gradient.

    Args:
      tau: strength of the regularisation to the reference. Default 0.008: Nash-MD-PG's.
    """
    return against(Draw(), tau)


def nash_ema_pg(*, tau: Strength = 0.008, decay: float = 0.999) -> Algorithm:
    """Nash-EMA-PG: the opponent has the running average of the policy's parameters.

    Args:
      tau: strength of the regularisation to the reference. Default 0.008: Nash-MD-PG's.
      decay: of the average. Default 0.999: one of the paper's.
    """
    return against(Draw(policy=0.0, average=1.0), tau, average_decay=decay)
