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
from jaxalign.models.compute import Compute
from jaxalign.models.config import ModelConfig
from jaxalign.models.lora import with_adapters
from jaxalign.models.probes import with_probes
from jaxalign.models.responses import response_log_probs


def pair_geometry(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: PairBatch,
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    compute: Compute = Compute(),
) -> PairGeometry:
    r"""n_w, n_l and the inner product over all trained parameters, by one backward pass.

    .. math:: n_w = \|\nabla_\theta \log\pi_w\|^2, \quad n_l = \|\nabla_\theta \log\pi_l\|^2,
              \quad \langle \nabla_\theta \log\pi_w, \nabla_\theta \log\pi_l \rangle

    The gradients themselves are never stored. In training, `PairProbe` gives the same values.

    Args:
      params: nested dict of arrays.
      config: the architecture.
      batch: pairs, as `pair_batches` makes them.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      compute: precision and memory.

    Returns:
      The pairs' Gram matrices, each field [pairs] in float32. See `probing`
      for values by layer and by kind of matrix.
    """
    rows = jax.tree.map(jnp.asarray, batch.rows())
    probes = zero_probes(params, config, rows, adapters=adapters)

    def log_probs(probes: Any) -> Float[Array, ""]:
        if adapters is None:
            policy = with_probes(params, probes)
        else:
            policy = with_adapters(params, with_probes(adapters, probes), adapter_scale)
        return response_log_probs(policy, config, rows, compute=compute).log_prob.sum()

    parts = contributions(jax.grad(log_probs)(probes), config, rows)
    return unweighted(total(parts), jnp.ones((rows.tokens.shape[0] // 2, 2)))


def two_pass_geometry(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: PairBatch,
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    compute: Compute = Compute(),
) -> PairGeometry:
    """`pair_geometry` by two backward passes per pair: the usual method, for comparison.

    Pairs are processed one by one, so that only two gradients are in memory; sums are in float32.

    Args:
      params: nested dict of arrays.
      config: the architecture.
      batch: pairs, as `pair_batches` makes them.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      compute: precision and memory.

    Returns:
      The pairs' Gram matrices, each field [pairs] in float32.
    """

    def of_pair(pair: PairBatch) -> tuple[Array, Array, Array]:
        rows = jax.tree.map(lambda x: x[None], pair).rows()

        def log_probs(trained: Any) -> Float[Array, " sides"]:
            policy = trained
            if adapters is not None:
                policy = with_adapters(params, trained, adapter_scale)
            return response_log_probs(policy, config, rows, compute=compute).log_prob.sum(-1)

        _, backward = jax.vjp(log_probs, params if adapters is None else adapters)
        chosen, rejected = (backward(side)[0] for side in jnp.eye(2))
        return gram(chosen, rejected)

    chosen, rejected, inner = jax.lax.map(of_pair, jax.tree.map(jnp.asarray, batch))
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
