"""Binary classifier optimisation, on pairs and on single responses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.losses.batch_means import weighted_mean
from jaxalign.losses.checks import positive
from jaxalign.losses.labelled import LabelledLogProbs
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import Statistics, with_statistics


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


def bco_label_means(
    responses: LabelledLogProbs, weight: Float[Array, " responses"] | None = None
) -> dict[str, Array]:
    """Sums of the log-ratios of each label in a batch, and their numbers, without gradient."""
    weight = jnp.ones_like(responses.log_prob) if weight is None else weight
    ratio = jax.lax.stop_gradient(responses.log_ratio)
    sums = {}
    for label, mask in (("desirable", responses.desirable), ("undesirable", ~responses.desirable)):
        counted = weight * mask.astype(weight.dtype)
        sums[f"{label}_sum"] = jnp.sum(jnp.where(counted > 0, ratio, 0.0) * counted)
        sums[f"{label}_count"] = jnp.sum(counted)
    return sums


def _add_sums(
    running: dict[str, Array],
    responses: LabelledLogProbs,
    weight: Float[Array, " responses"] | None,
) -> dict[str, Array]:
    """The sums since the start, with those of this batch, and the shift that they make."""
    now = bco_label_means(responses, weight)
    sums = {name: running[name] + value for name, value in now.items()}
    return {**sums, "mean_log_ratio": _middle(sums)}


def _middle(sums: dict[str, Array]) -> Float[Array, ""]:
    """The middle of the two labels' mean log-ratios; that of one label where the other is missing.

    Without any it is 0.
    """
    means = [
        (sums[f"{label}_sum"] / jnp.maximum(sums[f"{label}_count"], 1), sums[f"{label}_count"] > 0)
        for label in ("desirable", "undesirable")
    ]
    total = sum(jnp.where(known, mean, 0.0) for mean, known in means)
    return total / jnp.maximum(sum(known.astype(jnp.float32) for _, known in means), 1)


@with_statistics(
    Statistics(
        start=dict.fromkeys(
            (
                "desirable_sum",
                "desirable_count",
                "undesirable_sum",
                "undesirable_count",
                "mean_log_ratio",
            ),
            0.0,
        ),
        update=_add_sums,
        arguments=("mean_log_ratio",),
    )
)
def bco_unpaired(
    responses: LabelledLogProbs,
    *,
    beta: float = 0.01,
    mean_log_ratio: Float[Array, ""] | None = None,
) -> Float[Array, " responses"]:
    r"""Binary classification of single responses by their shifted implicit rewards.

    .. math:: \ell = -\log\sigma\bigl(\pm(\beta r - \delta)\bigr), \quad
              \delta = \tfrac{\beta}{2} \bigl(\bar r_D + \bar r_U\bigr), \quad
              r = \log\pi - \log\pi^{ref}

    with + for desirable responses, - for undesirable ones.

    Args:
      responses: log-probabilities summed over response tokens, in nats; every field is [responses].
      beta: inverse temperature of the implicit reward, > 0. Default 0.01: the paper's.
      mean_log_ratio: the middle of the mean log-ratios of desirable and of undesirable responses in
        nats, so that the reward shift delta is beta times it; a scalar without gradient. In
        training it is a running statistic: the means are over all responses since the start, this
        batch's included, and are saved with the checkpoint. Default None: of the responses given.

    Returns:
      One loss per response, [responses], not reduced. At policy = reference it is log 2.

    References:
      Jung et al., 2024, arXiv:2404.04656. Its weights for shifted prompts are the stage's
      `prompt_weights`.
    """
    positive(beta=beta)
    if mean_log_ratio is None:
        mean_log_ratio = _middle(bco_label_means(responses))
    shifted = beta * (responses.log_ratio - mean_log_ratio)
    return -jax.nn.log_sigmoid(jnp.where(responses.desirable, shifted, -shifted))
