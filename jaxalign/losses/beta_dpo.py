"""DPO with a beta that follows the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.batch_means import weighted_mean
from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics

MIN_BETA = 1e-3  # the authors' code clamps here
MOMENTUM = 0.9  # of the running mean, as in the authors' code


def beta_dpo_statistics(
    pairs: PairLogProbs, weight: Float[Array, " pairs"] | None = None
) -> dict[str, Array]:
    """Mean margin of a batch, without gradient."""
    return {"mean_margin": jax.lax.stop_gradient(weighted_mean(pairs.margin, weight))}


def _update_threshold(
    running: dict[str, Array], pairs: PairLogProbs, weight: Float[Array, " pairs"] | None
) -> dict[str, Array]:
    """M_0 with this batch's mean margin."""
    mean = beta_dpo_statistics(pairs, weight)["mean_margin"]
    return {"threshold": MOMENTUM * running["threshold"] + (1 - MOMENTUM) * mean}


@with_statistics(
    Statistics(
        batch=beta_dpo_statistics,
        start={"threshold": 0.0},
        update=_update_threshold,
        arguments=("threshold",),
    )
)
def beta_dpo(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    threshold: float | Float[Array, ""] = 0.0,
    mean_margin: Float[Array, ""] | None = None,
) -> Float[Array, " pairs"]:
    r"""DPO whose beta grows with how far the batch's mean margin is above its running mean.

    .. math:: \ell = -\log\sigma(\beta_b h), \quad
              \beta_b = \beta \bigl(1 + \alpha (\bar h - M_0)\bigr), \quad
              h = (\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)

    The batch's beta carries no gradient and is held above 0.001.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: beta of an average batch, > 0. Default 0.1: the paper's.
      alpha: how fast beta follows, per nat of margin, >= 0. Default 0.6: the paper's. At 0 the
        loss is DPO's.
      threshold: M_0, the running mean of the batches' mean margins, in nats. In training it is a
        running statistic: 0 at the start, 0.9 M_0 + 0.1 mean before each batch's loss, as in the
        authors' code, and saved with the checkpoint. Default 0: its value at the start.
      mean_margin: mean margin of the batch in nats, a scalar without gradient: a batch
        statistic. Default None: that of the pairs given (`beta_dpo_statistics`).

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is log 2.

    Slopes:
      d_w / d_l = 1

    References:
      Wu et al., 2024, arXiv:2407.08639, as in the authors' code, where the margin in beta_b is
      not scaled by beta. The paper also drops the pairs whose margin is an outlier.
    """
    positive(beta=beta)
    non_negative(alpha=alpha)
    if mean_margin is None:
        mean_margin = beta_dpo_statistics(pairs)["mean_margin"]
    batch_beta = jnp.maximum(beta * (1 + alpha * (mean_margin - threshold)), MIN_BETA)
    return -jax.nn.log_sigmoid(batch_beta * pairs.margin)
