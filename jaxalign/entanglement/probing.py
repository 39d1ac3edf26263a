"""Geometry of every pair from the backward pass of training, by probes and their cotangents."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.entanglement.conditions import PairGeometry
from jaxalign.models import devices
from jaxalign.models.probes import (
    Spans,
    cotangents_by_pairs,
    cut,
    factored_gram,
    lengths_of,
    probes_of,
    token_products,
)
from jaxalign.models.responses import embedding_ids
from jaxalign.records import AnyArray
from jaxalign.rows import ResponseRows

SMALLEST = 1e-12
"""Gradients with a smaller weight cannot be recovered with enough digits."""

Tree = Mapping[str, Any]
Contributions = dict[str, Float[Array, "pairs ... 3"]]


def zero_probes(
    params: Tree,
    config: Any,
    rows: ResponseRows,
    *,
    adapters: Tree | None = None,
) -> dict[str, Any]:
    """Probes (zeros) beside the trained parameters, for a batch of pairs.

    Args:
      params: the model's nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      rows: of the pairs; chosen and rejected alternate. If packed, their sides are apart.
      adapters: if given, they alone are the trained parameters.

    Returns:
      A tree for `models.probes.with_probes`, over the adapters if given, else over the parameters.
    """
    pairs = rows.tokens.shape[0] // 2
    ids = embedding_ids(config, rows.tokens, rows.response_tokens)
    computed = ids if rows.packed is None else rows.packed.tokens

    def zero(path: tuple[str, ...], arrays: Mapping[str, Array]) -> dict[str, Array]:
        stacked = (next(iter(arrays.values())).shape[0],) if "layers" in path else ()
        probe = {"probe": jnp.zeros((*stacked, pairs, 3))}
        if "embedding" not in arrays or path[0] in ("encoder", "decoder"):
            return probe
        width = arrays["embedding"].shape[-1]
        lookup = {"lookup": jnp.zeros((*computed.shape, width))}
        if path == ("positions",) or not config.tied:
            return lookup
        return lookup | probe | {"rows": jnp.zeros((pairs, 2, 2 * ids.shape[1], width))}

    return probes_of(params if adapters is None else adapters, zero)


def contributions(
    cotangents: Tree, config: Any, rows: ResponseRows, spans: Spans | None = None
) -> Contributions:
    """Contribution of each node of the parameter tree to the pairs' Gram matrices.

    Args:
      cotangents: of the `zero_probes`.
      config: of the model.
      rows: as in `zero_probes`.
      spans: of the pairs in packed rows (`models.responses.pair_spans`); None: not packed.

    Returns:
      Path of the node ("layers/q") -> [pairs, layers, 3] where layers are stacked, else [pairs, 3]:
      n_w, n_l and the inner product, each times the weights of the log-probs concerned.
    """
    parts: Contributions = {}

    def walk(tree: Tree, path: tuple[str, ...]) -> None:
        total = None
        if "probe" in tree:
            total = tree["probe"]
            total = jnp.moveaxis(total, 0, 1) if total.ndim == 3 else total
        if "lookup" in tree:
            ids = embedding_ids(config, rows.tokens, rows.response_tokens)
            if path == ("positions",):
                ids = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
            of_input = _lookup_gram(tree["lookup"], ids, tree.get("rows"), spans)
            total = of_input if total is None else total + of_input
        if total is not None:
            parts["/".join(path)] = total
        for name, inner in tree.items():
            if isinstance(inner, Mapping):
                walk(inner, (*path, name))

    walk(cotangents, ())
    return parts


def _lookup_gram(
    cotangents: Float[Array, "rows length width"],
    ids: Int[AnyArray, "sides ids"],
    other: Float[Array, "pairs 2 both_lengths width"] | None,
    spans: Spans | None,
) -> Float[Array, "pairs 3"]:
    """The Gram matrices of an embedding's gradients, including its use as unembedding.

    The gradients of rows with equal ids add up, so two cotangents have an inner product where their
    ids are equal. `other` has the rows of the unembedding's gradient at the same ids.
    """
    pairs, is_single_cpu = ids.shape[0] // 2, devices.is_single_cpu()

    def of_pair(inputs: tuple[Array, Array, Array | None, Array | None]) -> Array:
        x, ids, other, length = inputs

        def of_tokens(size: int) -> Array:
            chosen, rejected = ids[0, :size], ids[1, :size]
            own = ids[:, :size, None] == ids[:, None, :size]
            same = own, chosen[:, None] == rejected[None]
            return factored_gram(token_products(x[:, :size]), same)

        total = cut(of_tokens, ids.shape[1], length if is_single_cpu else None)
        if other is not None:
            rows = other.reshape(2, 2, -1, x.shape[-1])  # of whose gradient, at whose tokens
            meet = jnp.sum(jnp.sum(rows * x[None], axis=-1), axis=-1)
            own, cross = jnp.diagonal(meet), meet[0, 1] + meet[1, 0]
            total = total + jnp.concatenate([2 * own, cross[None]])
        return total

    x = cotangents_by_pairs(cotangents.astype(jnp.float32), pairs, spans)
    inputs = x, ids.reshape(pairs, 2, -1), other, lengths_of(spans)
    return jax.lax.map(of_pair, inputs) if is_single_cpu else jax.vmap(of_pair)(inputs)


def unweighted(
    weighted: Float[Array, "pairs ... 3"], weights: Float[Array, "pairs 2"]
) -> PairGeometry:
    """The Gram matrices of the log-probs' gradients, with their weights divided out.

    Args:
      weighted: sums of `contributions`.
      weights: factor on each log-prob's gradient.

    Returns:
      n_w, n_l and the inner product; NaN where a weight is too small to divide by.
    """
    weights = weights.reshape(weights.shape[0], *[1] * (weighted.ndim - 2), 2)
    weights = jnp.where(jnp.abs(weights) < SMALLEST, jnp.nan, weights)
    chosen, rejected = weights[..., 0], weights[..., 1]
    return PairGeometry(
        chosen=weighted[..., 0] / chosen / chosen,
        rejected=weighted[..., 1] / rejected / rejected,
        inner=weighted[..., 2] / chosen / rejected,
    )


def total(parts: Contributions) -> Float[Array, "pairs 3"]:
    """The sum over all parameters."""
    return sum((x.sum(1) if x.ndim == 3 else x for x in parts.values()), jnp.zeros(()))
