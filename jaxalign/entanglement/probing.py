"""Geometry of every pair from the backward pass of training, by probes and their cotangents."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.entanglement.conditions import PairGeometry
from jaxalign.models import devices
from jaxalign.models.probes import (
    by_pairs,
    factored_gram,
    probes_of,
    token_products,
)
from jaxalign.models.responses import embedding_ids
from jaxalign.records import AnyArray

SMALLEST = 1e-12
"""Gradients with a smaller weight cannot be recovered with enough digits."""

Tree = Mapping[str, Any]
Contributions = dict[str, Float[Array, "pairs ... 3"]]
Rows = Int[AnyArray, "rows length"]
Responses = Int[AnyArray, "rows response"]


def zero_probes(
    params: Tree,
    config: Any,
    tokens: Rows,
    response_tokens: Responses,
    *,
    adapters: Tree | None = None,
) -> dict[str, Any]:
    """Probes (zeros) beside the trained parameters, for a batch of pairs.

    Args:
      params: the model's nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      tokens: [2 pairs, length]; chosen and rejected alternate.
      response_tokens: [2 pairs, response].
      adapters: if given, they alone are the trained parameters.

    Returns:
      A tree for `models.probes.with_probes`, over the adapters if given, else over the parameters.
    """
    pairs = tokens.shape[0] // 2
    read = embedding_ids(config, tokens, response_tokens).shape

    def zero(path: tuple[str, ...], arrays: Mapping[str, Array]) -> dict[str, Array]:
        stacked = (next(iter(arrays.values())).shape[0],) if "layers" in path else ()
        probe = {"probe": jnp.zeros((*stacked, pairs, 3))}
        if "embedding" not in arrays or path[0] in ("encoder", "decoder"):
            return probe
        width = arrays["embedding"].shape[-1]
        if path == ("positions",):
            return {"lookup": jnp.zeros((*tokens.shape, width))}
        lookup = {"lookup": jnp.zeros((*read, width))}
        if not config.tied:
            return lookup
        return lookup | probe | {"rows": jnp.zeros((pairs, 2, 2 * read[1], width))}

    return probes_of(params if adapters is None else adapters, zero)


def contributions(
    cotangents: Tree, config: Any, tokens: Rows, response_tokens: Responses
) -> Contributions:
    """Contribution of each node of the parameter tree to the pairs' Gram matrices.

    Args:
      cotangents: of the `zero_probes`.
      config: of the model.
      tokens: as in `zero_probes`.
      response_tokens: as in `zero_probes`.

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
            ids = embedding_ids(config, tokens, response_tokens)
            if path == ("positions",):
                ids = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
            of_input = _lookup_gram(tree["lookup"], ids, tree.get("rows"))
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
    ids: Rows,
    other: Float[Array, "pairs 2 both_lengths width"] | None,
) -> Float[Array, "pairs 3"]:
    """The Gram matrices of an embedding's gradients, including its use as unembedding.

    The gradients of rows with equal ids add up, so two cotangents have an inner product where their
    ids are equal. `other` has the rows of the unembedding's gradient at the same ids.
    """
    pairs = ids.shape[0] // 2

    def of_pair(inputs: tuple[Array, Array, Array | None]) -> Array:
        x, ids, other = inputs
        same = ids[:, :, None] == ids[:, None, :], ids[0][:, None] == ids[1][None, :]
        total = factored_gram(token_products(x), same)
        if other is not None:
            rows = other.reshape(2, 2, -1, x.shape[-1])  # of whose gradient, at whose tokens
            meet = jnp.sum(jnp.sum(rows * x[None], axis=-1), axis=-1)
            own, cross = jnp.diagonal(meet), meet[0, 1] + meet[1, 0]
            total = total + jnp.concatenate([2 * own, cross[None]])
        return total

    x = by_pairs(cotangents.astype(jnp.float32), pairs)
    inputs = x, ids.reshape(pairs, 2, -1), other
    return jax.lax.map(of_pair, inputs) if devices.is_single_cpu() else jax.vmap(of_pair)(inputs)


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
