"""Alignment by optimal transport: distributions of margins instead of margins."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import flip_probability, positive
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics


def aot_statistics(
    pairs: PairLogProbs, weight: Float[Array, " pairs"] | None = None
) -> dict[str, Array]:
    """Reference margin of the same rank as each pair's policy margin, without gradient.

    Pairs of weight 0 are ranked last on both sides, and so are matched among themselves.
    """
    policy = jax.lax.stop_gradient(pairs.chosen - pairs.rejected)
    reference = jax.lax.stop_gradient(pairs.reference_chosen - pairs.reference_rejected)
    if weight is None:
        weight = jnp.ones_like(policy)
    filler = (weight == 0).astype(jnp.int32)
    by_policy = jnp.lexsort((policy, filler))
    by_reference = jnp.lexsort((reference, filler))
    matched = jnp.zeros_like(reference).at[by_policy].set(reference[by_reference])
    return {"reference_margin": matched}


@with_statistics(Statistics(batch=aot_statistics))
def aot(
    pairs: PairLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_margin: Float[Array, " pairs"] | None = None,
) -> Float[Array, " pairs"]:
    r"""DPO between quantiles: the policy's i-th smallest margin against the reference's i-th.

    .. math:: \ell_i = -(1-\epsilon) \log\sigma(\beta d_i) - \epsilon \log\sigma(-\beta d_i), \quad
              d_i = m_i - m^{ref}_{(\mathrm{rank}\, m_i)}, \quad m = \log\pi_w - \log\pi_l

    It is small when the policy's margins dominate the reference's as a distribution (first-order
    stochastic dominance), whichever pair has which.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature, > 0. Default 0.1: TRL's.
      label_smoothing: probability epsilon that a label is flipped, in [0, 0.5). Default 0.
      reference_margin: the reference margin matched to each pair, [pairs], in nats: a batch
        statistic. Default None: matched by rank among the pairs given (`aot_statistics`).

    Returns:
      One loss per pair, in the order of the pairs, [pairs], not reduced. At policy = reference it
      is log 2.

    Slopes:
      d_w / d_l = 1

    References:
      Melnyk et al., 2024, arXiv:2406.05882, the paired form (TRL's `aot`, not its `aot_pair`).
    """
    positive(beta=beta)
    flip_probability(label_smoothing=label_smoothing)
    if reference_margin is None:
        reference_margin = aot_statistics(pairs)["reference_margin"]
    lead = pairs.chosen - pairs.rejected - reference_margin
    agree, flipped = jax.nn.log_sigmoid(beta * lead), jax.nn.log_sigmoid(-beta * lead)
    return -(1 - label_smoothing) * agree - label_smoothing * flipped
