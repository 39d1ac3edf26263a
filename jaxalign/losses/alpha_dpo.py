"""SimPO with a target margin that adapts to each pair."""

import jax
from jaxtyping import Array, Float

from jaxalign.losses.batch_means import weighted_mean, weighted_std
from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics

SMALLEST_STD = 1e-6  # a batch of one pair, or of equal pairs, has no spread to divide by


def alpha_dpo_statistics(
    pairs: PairLogProbs, weight: Float[Array, " pairs"] | None = None
) -> dict[str, Array]:
    """Mean and standard deviation of the per-token margin over a batch, without gradient."""
    margin = jax.lax.stop_gradient(_mean_margin(pairs))
    return {
        "mean_margin": weighted_mean(margin, weight),
        "std_margin": weighted_std(margin, weight),
    }


@with_statistics(Statistics(batch=alpha_dpo_statistics))
def alpha_dpo(
    pairs: PairLogProbs,
    *,
    beta: float = 2.5,
    gamma: float = 1.5,
    alpha: float = 0.2,
    mean_margin: Float[Array, ""] | None = None,
    std_margin: Float[Array, ""] | None = None,
) -> Float[Array, " pairs"]:
    r"""SimPO whose target is higher for pairs that already lead the reference by more.

    .. math:: \ell = -\log\sigma\bigl(\beta (\bar a_w - \bar a_l - \alpha M^*) - \gamma\bigr), \quad
              M^* = \frac{M - \mathrm{mean}(M)}{\mathrm{std}(M)}, \quad
              M = \frac{r_w}{L_w} - \frac{r_l}{L_l}, \quad \bar a = \frac{\log\pi}{L}, \quad
              r = \log\pi - \log\pi^{ref}

    The standardised margin carries no gradient.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: scale of the mean log-probability, > 0. Default 2.5: the authors' for Llama-3-Instruct.
      gamma: target reward margin common to all pairs. Default 1.5: gamma / beta = 0.6, as there.
      alpha: nats per token of extra target per standard deviation of the margin M. Default 0.2,
        as there. At 0 the loss is SimPO's.
      mean_margin: mean of M over the batch, in nats per token, a scalar without gradient: a
        batch statistic, as in the paper; the authors' code keeps moving averages (decay 0.9)
        instead. Default None: that of the pairs given (`alpha_dpo_statistics`).
      std_margin: standard deviation of M, likewise.

    Returns:
      One loss per pair, [pairs], not reduced. At equal means and average M, log(1 + exp(gamma)).

    Slopes:
      d_w / d_l = L_l / L_w

    References:
      Wu et al., 2024, arXiv:2410.10148, as in the authors' code, where beta scales alpha M* too.
    """
    positive(beta=beta)
    statistics = alpha_dpo_statistics(pairs)
    mean_margin = statistics["mean_margin"] if mean_margin is None else mean_margin
    std_margin = statistics["std_margin"] if std_margin is None else std_margin
    standardised = (_mean_margin(pairs) - mean_margin) / (std_margin + SMALLEST_STD)
    target = jax.lax.stop_gradient(alpha * standardised)
    return -jax.nn.log_sigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean - target) - gamma)


def _mean_margin(pairs: PairLogProbs) -> Float[Array, " pairs"]:
    chosen = pairs.chosen_log_ratio / pairs.chosen_tokens
    return chosen - pairs.rejected_log_ratio / pairs.rejected_tokens
