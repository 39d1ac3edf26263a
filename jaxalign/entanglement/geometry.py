"""The exact Gram matrix of every pair's two gradients, one pair at a time."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.data.batches import PairBatch
from jaxalign.entanglement.conditions import PairGeometry
from jaxalign.models.responses import response_log_probs


def pair_geometry(
    params: Mapping[str, Any],
    config: Any,
    batch: PairBatch,
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    remat: str = "none",
    dtype: Any = None,
) -> PairGeometry:
    r"""n_w, n_l and the inner product over all trained parameters, by two backward passes per pair.

    .. math:: n_w = \|\nabla_\theta \log\pi_w\|^2, \quad n_l = \|\nabla_\theta \log\pi_l\|^2,
              \quad \langle \nabla_\theta \log\pi_w, \nabla_\theta \log\pi_l \rangle

    Pairs pass one after the other, so that two gradients are held at a time and no more; sums
    are formed in float32. For a checkpoint, not for every step of training.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      batch: pairs, as `pair_batches` makes them.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      remat: what the backward pass computes again, as in `decoder.hidden_states`.
      dtype: of the computation; None is the parameters' own.

    Returns:
      The pairs' Gram matrices, each field [pairs] in float32.
    """

    def of_pair(pair: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
        def log_probs(trained: Any) -> Float[Array, " sides"]:
            weights, updates = (trained, None) if adapters is None else (params, trained)
            rows = response_log_probs(
                weights,
                config,
                *pair,
                remat=remat,
                dtype=dtype,
                adapters=updates,
                adapter_scale=adapter_scale,
            )
            return rows.log_prob.sum(-1)

        _, backward = jax.vjp(log_probs, params if adapters is None else adapters)
        chosen, rejected = (backward(side)[0] for side in jnp.eye(2))
        return _inner(chosen, chosen), _inner(rejected, rejected), _inner(chosen, rejected)

    rows = (batch.tokens, batch.prompt_length, batch.response_tokens, batch.response_length)
    chosen, rejected, inner = jax.lax.map(of_pair, tuple(map(jnp.asarray, rows)))
    return PairGeometry(chosen=chosen, rejected=rejected, inner=inner)


def _inner(first: Any, second: Any) -> Float[Array, ""]:
    """The inner product of two trees."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), first, second
    )
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))
