"""The exact Gram matrix of the two gradients of every pair, for fixed parameters."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.data.batches import PairBatch
from jaxalign.entanglement.conditions import PairGeometry
from jaxalign.entanglement.probing import contributions, total, unweighted, zero_probes
from jaxalign.models.probes import with_probes
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
    r"""n_w, n_l and the inner product over all trained parameters, by one backward pass.

    .. math:: n_w = \|\nabla_\theta \log\pi_w\|^2, \quad n_l = \|\nabla_\theta \log\pi_l\|^2,
              \quad \langle \nabla_\theta \log\pi_w, \nabla_\theta \log\pi_l \rangle

    The gradients themselves are never stored. In training, `PairProbe` gives the same values.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      batch: pairs, as `pair_batches` makes them.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      remat: what the backward pass recomputes, as in `decoder.hidden_states`.
      dtype: of the computation; None: that of the parameters.

    Returns:
      The pairs' Gram matrices, each field [pairs] in float32. See `probing`
      for values by layer and by kind of matrix.
    """
    rows = tuple(map(jnp.asarray, batch.rows()))
    tokens, _, response_tokens, _ = rows
    probes = zero_probes(params, config, tokens, response_tokens, adapters=adapters)

    def log_probs(probes: Any) -> Float[Array, ""]:
        weights, updates = params, adapters
        if updates is None:
            weights = with_probes(params, probes)
        else:
            updates = with_probes(updates, probes)
        out = response_log_probs(
            weights,
            config,
            *rows,
            remat=remat,
            dtype=dtype,
            adapters=updates,
            adapter_scale=adapter_scale,
        )
        return out.log_prob.sum()

    parts = contributions(jax.grad(log_probs)(probes), config, tokens, response_tokens)
    return unweighted(total(parts), jnp.ones((tokens.shape[0] // 2, 2)))


def two_pass_geometry(
    params: Mapping[str, Any],
    config: Any,
    batch: PairBatch,
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    remat: str = "none",
    dtype: Any = None,
) -> PairGeometry:
    """`pair_geometry` by two backward passes per pair: the usual method, for comparison.

    Pairs are processed one by one, so that only two gradients are in memory; sums are in float32.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      batch: pairs, as `pair_batches` makes them.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      remat: what the backward pass recomputes, as in `decoder.hidden_states`.
      dtype: of the computation; None: that of the parameters.

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
        return gram(chosen, rejected)

    rows = (batch.tokens, batch.prompt_length, batch.response_tokens, batch.response_length)
    chosen, rejected, inner = jax.lax.map(of_pair, tuple(map(jnp.asarray, rows)))
    return PairGeometry(chosen=chosen, rejected=rejected, inner=inner)


def gram(
    first: Any, second: Any, diagonal: Any = None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    r"""Squared norms of two gradients and their inner product, summed in float32.

    .. math:: \langle u, v \rangle_P = \sum_i P_i u_i v_i

    Args:
      first: a tree of arrays.
      second: a tree of the same shapes.
      diagonal: P as such a tree; None: 1 everywhere.
    """

    def inner(u: Any, v: Any) -> Float[Array, ""]:
        trees = (u, v) if diagonal is None else (u, v, diagonal)
        products = jax.tree.map(
            lambda *x: jnp.sum(math.prod(y.astype(jnp.float32) for y in x)), *trees
        )
        return jnp.sum(jnp.stack(jax.tree.leaves(products)))

    return inner(first, first), inner(second, second), inner(first, second)
