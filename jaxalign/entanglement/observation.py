"""Per-pair statistics of a training step, and the metrics that are logged of them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.entanglement.coefficients import Coefficients
from jaxalign.entanglement.conditions import (
    CASES,
    PairGeometry,
    band,
    case,
    case_of_changes,
    cosine,
    first_order_changes,
    norm_ratio,
)
from jaxalign.records import record


@record
class Observation:
    """Statistics of the pairs of a batch before its update.

    Attributes:
      geometry: over all trained parameters.
      weights: the loss's coefficients.
      log_probs: of chosen and rejected, in nats.
      preconditioned: geometry in the optimiser's inner product; None: not computed.
      parts: path of each matrix ("layers/q") -> its contribution to the geometry, [pairs] or
        [pairs, layers]; empty: not computed.
    """

    geometry: PairGeometry
    weights: Coefficients
    log_probs: Float[Array, "pairs 2"]
    preconditioned: PairGeometry | None
    parts: Mapping[str, Any]


def summary(
    observation: Observation, after: Float[Array, "pairs 2"] | None = None
) -> dict[str, Float[Array, " pairs"]]:
    """Values per pair of every logged metric; NaN where undefined.

    Args:
      observation: of the batch.
      after: log-probs of the same pairs after the update; None: not computed.

    Returns:
      `cosine`; `norm_chosen`, `norm_rejected` (of the gradients); `norm_ratio` (r*); `c_w` and
      `c_l` (inner product over n_w and over n_l; DPO is ideal where both are below 1); `d_w`, `d_l`
      (coefficients); `in_band` (1 where d_w / d_l lies in the disentanglement band); one indicator
      per case; `predicted_chosen`, `predicted_rejected`: changes in nats per unit of learning rate,
      to first order, of a gradient step on the pair alone. With `after`: `realised_chosen`,
      `realised_rejected`, changes in nats, and `case_agreement` (1 where the realised signs are
      those of the predicted case). With a preconditioned geometry: everything that depends on the
      geometry a second time, under `adamw/`.
    """
    values = _numbers(observation.geometry, observation.weights, observation.log_probs, after)
    values |= {"d_w": observation.weights.chosen, "d_l": observation.weights.rejected}
    if after is not None:
        chosen, rejected = (after - observation.log_probs).T
        values |= {"realised_chosen": chosen, "realised_rejected": rejected}
    if observation.preconditioned is not None:
        numbers = _numbers(
            observation.preconditioned, observation.weights, observation.log_probs, after
        )
        values |= {f"adamw/{name}": value for name, value in numbers.items()}
    for path, part in observation.parts.items():
        values[f"{path}/cosine"] = cosine(part)
    return {f"entanglement/{name}": value for name, value in values.items()}


def _numbers(
    geometry: PairGeometry,
    weights: Coefficients,
    before: Float[Array, "pairs 2"],
    after: Float[Array, "pairs 2"] | None,
) -> dict[str, Float[Array, " pairs"]]:
    """The metrics of one geometry."""
    lower, upper = band(geometry)
    ratio = weights.chosen / weights.rejected
    boundless = jnp.isposinf(ratio) & jnp.isposinf(upper)  # d_l = 0, and no upper end
    cases = case(geometry, weights)
    predicted = first_order_changes(geometry, weights)
    values = {
        "cosine": cosine(geometry),
        "norm_chosen": jnp.sqrt(geometry.chosen),
        "norm_rejected": jnp.sqrt(geometry.rejected),
        "norm_ratio": norm_ratio(geometry),
        "c_w": geometry.inner / geometry.chosen,
        "c_l": geometry.inner / geometry.rejected,
        "in_band": _defined((lower < ratio) & ((ratio < upper) | boundless), lower + ratio),
        "predicted_chosen": predicted[0],
        "predicted_rejected": predicted[1],
    }
    for number, name in enumerate(CASES):
        values[name.replace(" ", "_")] = (cases == number).astype(jnp.float32)
    if after is not None:
        realised = case_of_changes(*(after - before).T)
        values["case_agreement"] = jnp.where(cases == 0, jnp.nan, realised == cases)
    return values


def _defined(truth: Array, value: Array) -> Float[Array, " pairs"]:
    """1 or 0; NaN where `value` is NaN."""
    return jnp.where(jnp.isnan(value), jnp.nan, truth.astype(jnp.float32))
