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
    cotangents_by_groups,
    cut,
    factored_gram,
    lengths_of,
    number_of_sides,
    probes_of,
    side_pairs,
    token_products,
)
from jaxalign.models.responses import embedding_ids
from jaxalign.records import AnyArray
from jaxalign.rows import ResponseRows

SMALLEST = 1e-12
"""Gradients with a smaller weight cannot be recovered with enough digits."""

Tree = Mapping[str, Any]
Contributions = dict[str, Float[Array, "groups ... products"]]


def zero_probes(
    params: Tree,
    config: Any,
    rows: ResponseRows,
    *,
    sides: int = 2,
    adapters: Tree | None = None,
) -> dict[str, Any]:
    """Probes (zeros) beside the trained parameters, for a batch of pairs or larger groups.

    Args:
      params: the model's nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      rows: of the pairs; chosen and rejected alternate. In general, the sides of one group after
        those of another. If packed, they are those of pairs, apart.
      sides: rows of a group.
      adapters: if given, they alone are the trained parameters.

    Returns:
      A tree for `models.probes.with_probes`, over the adapters if given, else over the parameters.
    """
    groups, number = rows.tokens.shape[0] // sides, sides * (sides + 1) // 2
    ids = embedding_ids(config, rows.tokens, rows.response_tokens)
    computed = ids if rows.packed is None else rows.packed.tokens

    def zero(path: tuple[str, ...], arrays: Mapping[str, Array]) -> dict[str, Array]:
        stacked = (next(iter(arrays.values())).shape[0],) if "layers" in path else ()
        probe = {"probe": jnp.zeros((*stacked, groups, number))}
        if "embedding" not in arrays or path[0] in ("encoder", "decoder"):
            return probe
        width = arrays["embedding"].shape[-1]
        lookup = {"lookup": jnp.zeros((*computed.shape, width))}
        if path == ("positions",) or not config.tied:
            return lookup
        return lookup | probe | {"rows": jnp.zeros((groups, sides, sides * ids.shape[1], width))}

    return probes_of(params if adapters is None else adapters, zero)


def contributions(
    cotangents: Tree,
    config: Any,
    rows: ResponseRows,
    spans: Spans | None = None,
    *,
    sides: int = 2,
) -> Contributions:
    """Contribution of each node of the parameter tree to the groups' Gram matrices.

    Args:
      cotangents: of the `zero_probes`.
      config: of the model.
      rows: as in `zero_probes`.
      spans: of the pairs in packed rows (`models.responses.pair_spans`); None: not packed.
      sides: as in `zero_probes`.

    Returns:
      Path of the node ("layers/q") -> [groups, layers, products] where layers are stacked, else
      [groups, products]: for pairs n_w, n_l and the inner product, each times the weights of the
      log-probs concerned; for larger groups in the order of `models.probes.side_pairs`.
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
            of_input = _lookup_gram(tree["lookup"], ids, tree.get("rows"), spans, sides)
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
    ids: Int[AnyArray, "all_sides ids"],
    other: Float[Array, "groups sides all_lengths width"] | None,
    spans: Spans | None,
    sides: int,
) -> Float[Array, "groups products"]:
    """The Gram matrices of an embedding's gradients, including its use as unembedding.

    The gradients of rows with equal ids add up, so two cotangents have an inner product where their
    ids are equal. `other` has the rows of the unembedding's gradient at the same ids.
    """
    (first, second), is_single_cpu = side_pairs(sides), devices.is_single_cpu()

    def of_group(inputs: tuple[Array, Array, Array | None, Array | None]) -> Array:
        x, ids, other, length = inputs

        def of_tokens(size: int) -> Array:
            same = ids[first][:, :size, None] == ids[second][:, None, :size]
            return factored_gram(token_products(x[:, :size]), same.astype(x.dtype))

        total = cut(of_tokens, ids.shape[1], length if is_single_cpu else None)
        if other is not None:
            rows = other.reshape(sides, *x.shape)  # of whose gradient, at whose tokens
            meet = jnp.sum(jnp.sum(rows * x[None], axis=-1), axis=-1)
            total = total + (meet + meet.T)[first, second]
        return total

    x = cotangents.astype(jnp.float32)
    groups = ids.shape[0] // sides
    x = cotangents_by_groups(x, jnp.zeros((groups, len(first))), spans)
    inputs = x, ids.reshape(groups, sides, -1), other, lengths_of(spans)
    return jax.lax.map(of_group, inputs) if is_single_cpu else jax.vmap(of_group)(inputs)


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


def symmetric(products: Float[Array, "groups ... products"]) -> Float[Array, "groups ... s s"]:
    """The Gram matrices of groups from their entries."""
    sides = number_of_sides(products)
    first, second = side_pairs(sides)
    whole = jnp.zeros((*products.shape[:-1], sides, sides), products.dtype)
    return whole.at[..., first, second].set(products).at[..., second, first].set(products)


def total(parts: Contributions) -> Float[Array, "groups products"]:
    """The sum over all parameters."""
    return sum((x.sum(1) if x.ndim == 3 else x for x in parts.values()), jnp.zeros(()))
