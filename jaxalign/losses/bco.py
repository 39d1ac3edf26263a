"""Binary classifier optimisation, on pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics
from jaxalign.losses.weighted import weighted_mean


def bco_statistics(
    pairs: PairLogProbs, weight: Float[Array, " pairs"] | None = None
) -> dict[str, Array]:
    """Mean log-ratio of all responses of a batch, without gradient: `bco`'s reward shift / beta."""
    both = jnp.concatenate([pairs.chosen_log_ratio, pairs.rejected_log_ratio])
    doubled = None if weight is None else jnp.concatenate([weight, weight])
    return {"mean_log_ratio": jax.lax.stop_gradient(weighted_mean(both, doubled))}


def _update_mean(
    running: dict[str, Array], pairs: PairLogProbs, weight: Float[Array, " pairs"] | None
) -> dict[str, Array]:
    """Mean log-ratio of all responses so far, and their number, with those of this batch."""
    pairs_now = pairs.chosen.shape[0] if weight is None else jnp.sum(weight)
    responses = running["responses"] + 2 * pairs_now
    change = bco_statistics(pairs, weight)["mean_log_ratio"] - running["mean_log_ratio"]
    fraction = 2 * pairs_now / jnp.maximum(responses, 1)
    return {
        "mean_log_ratio": running["mean_log_ratio"] + change * fraction,
        "responses": responses,
    }


@with_statistics(
    Statistics(
        start={"mean_log_ratio": 0.0, "responses": 0.0},
        update=_update_mean,
        arguments=("mean_log_ratio",),
    )
)
def bco(
    pairs: PairLogProbs,
    *,
    beta: float = 0.01,
    mean_log_ratio: Float[Array, ""] | None = None,
) -> Float[Array, " pairs"]:
    r"""Binary classification of chosen and rejected by their implicit rewards, shifted by the mean.

    .. math:: \ell = -\log\sigma(\beta r_w - \delta) - \log\sigma(\delta - \beta r_l), \quad
              \delta = \beta \bar r, \quad r = \log\pi - \log\pi^{ref}

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      beta: inverse temperature of the implicit reward, > 0. Default 0.01: the paper's.
      mean_log_ratio: mean log-ratio over chosen and rejected responses in nats, so that the
        reward shift delta is beta times it; a scalar without gradient. In training it is a
        running statistic: the mean over all responses since the start, this batch's included, as
        in TRL's BCO trainer, and saved with the checkpoint. Default None: the mean over the pairs
        given (`bco_statistics`), which makes a pair's loss depend on its batch.

    Returns:
      One loss per pair, [pairs], not reduced. At policy = reference it is 2 log 2.

    Slopes:
      d_w / d_l = sigma(delta - beta r_w) / sigma(beta r_l - delta)

    References:
      Jung et al., 2024, arXiv:2404.04656, without its weights for shifted prompts.
    """
    positive(beta=beta)
    if mean_log_ratio is None:
        mean_log_ratio = bco_statistics(pairs)["mean_log_ratio"]
    chosen = beta * (pairs.chosen_log_ratio - mean_log_ratio)
    rejected = beta * (pairs.rejected_log_ratio - mean_log_ratio)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)
