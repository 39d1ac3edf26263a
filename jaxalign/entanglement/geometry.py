"""The exact Gram matrices of the gradients of pairs and groups, for fixed parameters."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.data.batches import PairBatch
from jaxalign.entanglement.conditions import PairGeometry
from jaxalign.entanglement.groups import GroupGeometry
from jaxalign.entanglement.probing import (
    Contributions,
    contributions,
    symmetric,
    total,
    unweighted,
    zero_probes,
)
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
    parts = row_contributions(
        params,
        config,
        batch,
        jnp.ones(()),
        adapters=adapters,
        adapter_scale=adapter_scale,
        compute=compute,
    )
    return unweighted(total(parts), jnp.ones(batch.response_length.shape))


def group_geometry(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: PairBatch,
    coefficients: Float[Array, "prompts samples response"],
    *,
    adapters: Mapping[str, Any] | None = None,
    adapter_scale: float = 1.0,
    compute: Compute = Compute(),
) -> dict[str, GroupGeometry]:
    """`groups.GroupGeometry` of the responses to each prompt, by one backward pass.

    Every response has two rows: one whose tokens are weighted by their coefficients, and one whose
    tokens all have weight 1. Their Gram matrix has both kinds of inner products.

    Args:
      params: nested dict of arrays.
      config: the architecture.
      batch: prompts with several responses each.
      coefficients: minus the derivatives of a loss with respect to the tokens' log-probs.
      adapters: low-rank updates; if given, they alone are the trained parameters.
      adapter_scale: factor on the updates, alpha / rank.
      compute: precision and memory.

    Returns:
      Path of each matrix ("layers/q") -> its contribution, which has an axis of layers after that
      of prompts where layers are stacked; "" -> the sum over all trained parameters. In float32.
    """
    samples = coefficients.shape[1]

    def twice(x: Any) -> Array:
        return jnp.concatenate([jnp.asarray(x)] * 2, axis=1)

    rows = PairBatch(
        tokens=twice(batch.tokens),
        prompt_length=twice(batch.prompt_length),
        response_tokens=twice(batch.response_tokens),
        response_length=twice(batch.response_length),
        record_index=batch.record_index,
        weight=batch.weight,
        scored_positions=None if (at := batch.scored_positions) is None else twice(at),
    )
    parts = row_contributions(
        params,
        config,
        rows,
        jnp.concatenate([coefficients, jnp.ones_like(coefficients)], axis=1),
        adapters=adapters,
        adapter_scale=adapter_scale,
        compute=compute,
    )

    def of_responses(products: Array) -> GroupGeometry:
        whole = symmetric(products)[..., samples:, :]
        return GroupGeometry(gradients=whole[..., samples:], effects=whole[..., :samples])

    return {path: of_responses(x) for path, x in {"": total(parts), **parts}.items()}


def row_contributions(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: PairBatch,
    weights: Float[Array, "..."],
    *,
    adapters: Mapping[str, Any] | None,
    adapter_scale: float,
    compute: Compute,
) -> Contributions:
    """Contributions of each matrix to the Gram matrices of the sides' weighted log-probs.

    Args:
      params: as in `pair_geometry`.
      config: as in `pair_geometry`.
      batch: groups of rows.
      weights: of the tokens.
      adapters: as in `pair_geometry`.
      adapter_scale: as in `pair_geometry`.
      compute: as in `pair_geometry`.
    """
    rows, (_, sides, _) = jax.tree.map(jnp.asarray, batch.rows()), batch.response_tokens.shape
    probes = zero_probes(params, config, rows, sides=sides, adapters=adapters)

    def log_probs(probes: Any) -> Float[Array, ""]:
        if adapters is None:
            policy = with_probes(params, probes)
        else:
            policy = with_adapters(params, with_probes(adapters, probes), adapter_scale)
        found = response_log_probs(policy, config, rows, compute=compute).log_prob
        return jnp.sum(weights * found.reshape(batch.response_tokens.shape))

    return contributions(jax.grad(log_probs)(probes), config, rows, sides=sides)


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
