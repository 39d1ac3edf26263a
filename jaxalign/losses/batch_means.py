"""Weighted averages over the rows of a batch; rows of weight 0 are padding."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Weight = Float[Array, " rows"] | None


def weighted_mean(values: Float[Array, " rows"], weight: Weight = None) -> Float[Array, ""]:
    """Mean of `values` under `weight`; None weights rows equally; a total weight of 0 gives 0."""
    weight = jnp.ones_like(values) if weight is None else weight
    total = jnp.sum(weight)
    return jnp.sum(weight * values) / jnp.where(total > 0, total, 1.0)


def weighted_std(values: Float[Array, " rows"], weight: Weight = None) -> Float[Array, ""]:
    """Population standard deviation of `values` under `weight`."""
    deviation = values - weighted_mean(values, weight)
    return jnp.sqrt(weighted_mean(jnp.square(deviation), weight))
