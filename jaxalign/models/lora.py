"""Low-rank adapters: a tree of their own, trained, dropped out, applied or merged.

The forward pass is a pure function of the parameters. `with_adapters` returns parameters with each
adapter beside its matrix, so every function that takes parameters also takes adapted ones.
"""

import fnmatch
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign.errors import UserError

Adapter = Mapping[str, Any]
Adapters = dict[str, Any]


def matrix_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path ("layers/q") -> [layers, inputs, outputs] of every matrix that can have an adapter.

    These are the stacked kernels below a "layers" anywhere in the tree, encoder-decoders' too; of
    experts, [layers, experts, inputs, outputs].
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def walk(tree: Mapping[str, Any], names: tuple[str, ...]) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*names, name))
            elif name == "kernel" and "layers" in names and len(value.shape) >= 3:
                shapes["/".join(names)] = value.shape

    walk(params, ())
    return shapes


def items(adapters: Mapping[str, Any], prefix: str = "") -> dict[str, Adapter]:
    """Path ("layers/q") -> {"a", "b"} of every adapter in a tree."""
    flat: dict[str, Adapter] = {}
    for name, value in adapters.items():
        path = f"{prefix}{name}"
        flat |= {path: value} if "a" in value else items(value, f"{path}/")
    return flat


def nested(flat: Mapping[str, Adapter]) -> Adapters:
    """The reverse of `items`."""
    tree: Adapters = {}
    for path, adapter in flat.items():
        *parents, name = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = adapter
    return tree


def _own_key(key: Array, path: str) -> Array:
    """A key that depends on the path alone, not on which other adapters exist."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _selected(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The paths that targets match, by their last name or as a whole.

    Raises:
      UserError: if a target matches none.
    """
    chosen = []
    for target in targets:
        hits = [
            path
            for path in paths
            if fnmatch.fnmatchcase(path.split("/")[-1], target) or fnmatch.fnmatchcase(path, target)
        ]
        if not hits:
            there = ", ".join(sorted({path.split("/")[-1] for path in paths})) or "none"
            raise UserError(
                f"lora.targets: {target!r} names no matrix of the model; it has {there}"
            )
        chosen += hits
    return sorted(set(chosen))


def init_adapters(
    params: Mapping[str, Any], key: Array, *, rank: int, targets: Sequence[str]
) -> Adapters:
    r"""Adapters that change nothing yet.

    .. math:: A \sim U(-n^{-1/2}, n^{-1/2}), \quad B = 0, \quad n \text{ inputs}

    This is the default of PEFT (`LoraLayer.reset_lora_parameters`, kaiming-uniform with
    a = sqrt 5); arXiv:2106.09685, section 4.1, has a normal A.

    Args:
      params: the model's parameters, or their shapes.
      key: one PRNG key; each matrix draws from a key of its own name.
      rank: inner size of each adapter, at least 1.
      targets: names of matrices ("q"), patterns ("*") or whole paths ("decoder/layers/q").

    Returns:
      A tree that mirrors the parameters' paths, {"layers": {"q": {"a": [layers, in, rank],
      "b": [layers, rank, out]}, ...}}, in float32; experts have an adapter each, [layers, experts,
      in, rank].

    Raises:
      UserError: if the rank is below 1, or there are no targets, or one names no matrix.
    """
    if rank < 1:
        raise UserError(f"lora.rank: {rank} is not a rank; it is at least 1")
    shapes = matrix_shapes(params)
    paths = _selected(list(shapes), targets)
    if not paths:
        raise UserError("lora.targets: empty; name at least one matrix, or '*' for all")
    flat: dict[str, Adapter] = {}
    for path in paths:
        *lead, inputs, outputs = shapes[path]
        bound = inputs**-0.5
        a = jax.random.uniform(
            _own_key(key, path), (*lead, inputs, rank), jnp.float32, minval=-bound, maxval=bound
        )
        flat[path] = {"a": a, "b": jnp.zeros((*lead, rank, outputs), jnp.float32)}
    return nested(flat)


def _each(change: Callable[[str, Adapter], Adapter], adapters: Mapping[str, Any]) -> dict[str, Any]:
    return nested({path: change(path, adapter) for path, adapter in items(adapters).items()})


def with_dropout(adapters: Mapping[str, Any], key: Array, *, rate: float) -> Adapters:
    r"""Adapters with dropout on their inputs.

    .. math:: y = x W + s \, (m \odot x / (1 - p)) A B, \quad m \sim \text{Bernoulli}(1 - p)

    Each adapter of each layer gets a key, from which `layers.dense` draws m per token and feature;
    the frozen path reads all of x. This is PEFT's `lora_dropout`, except that there queries, keys
    and values of a fused matrix share one m.

    Args:
      adapters: as `init_adapters` makes them.
      key: one PRNG key, of one step.
      rate: p, in [0, 1).

    Returns:
      The adapters with "dropout_key" and "dropout_rate", [layers], beside each "a" and "b"; as
      they are for a rate of 0.

    Raises:
      UserError: if the rate is not in [0, 1), or there are adapters of experts.
    """
    if not 0.0 <= rate < 1.0:
        raise UserError(f"lora.dropout: {rate} is not in [0, 1)")
    if rate == 0.0:
        return dict(adapters)

    def seeded(path: str, adapter: Adapter) -> Adapter:
        if adapter["a"].ndim > 3:
            raise UserError(
                f"lora.dropout: {rate} on {path}: adapters of experts have no dropout (PEFT's have "
                "none either); set 0, or leave the experts out of lora.targets"
            )
        layers = adapter["a"].shape[0]
        keys = jax.random.split(_own_key(key, path), layers)
        rates = jnp.full((layers,), rate, jnp.float32)
        return {**adapter, "dropout_key": keys, "dropout_rate": rates}

    return _each(seeded, adapters)


def with_adapters(
    params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float | Float[Array, ""]
) -> dict[str, Any]:
    r"""Parameters whose forward pass adds the low-rank updates.

    .. math:: y = x W + s \, x A B

    Args:
      params: the model's parameters, or those of one layer; not changed.
      adapters: as `init_adapters` makes them, or those of the layer.
      scale: s, alpha / rank.

    Returns:
      The parameters, all leaves the very same arrays, with {"a", "b", "scale"} under "adapter"
      beside each adapted kernel.
    """
    if "a" in adapters:
        layers = adapters["a"].shape[:-2]
        is_number = isinstance(scale, float | int)
        every = np.full(layers, scale, np.float32) if is_number else jnp.broadcast_to(scale, layers)
        return {**params, "adapter": {**adapters, "scale": every}}
    changed = {name: with_adapters(params[name], adapters[name], scale) for name in adapters}
    return {**params, **changed}


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float | Float[Array, ""]
) -> dict[str, Any]:
    r"""Parameters with the low-rank updates added to the kernels.

    .. math:: W' = W + s A B

    Args:
      params: the model's parameters; not changed.
      adapters: as `init_adapters` makes them.
      scale: s, alpha / rank.

    Returns:
      The parameters, each adapted kernel in its own dtype (the sum is computed in float32), all
      other leaves the very same arrays.
    """
    if "a" in adapters:
        a, b = (jnp.asarray(adapters[name], jnp.float32) for name in ("a", "b"))
        update = jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
        kernel = jnp.asarray(params["kernel"])
        summed = kernel.astype(jnp.float32) + update * jnp.asarray(scale, jnp.float32)
        return {**params, "kernel": summed.astype(kernel.dtype)}
    return {**params, **{name: merge(params[name], adapters[name], scale) for name in adapters}}


def stack(first: Mapping[str, Any], second: Mapping[str, Any]) -> Adapters:
    r"""One tree of adapters whose update is the sum of two.

    .. math:: A = [A_1 \; A_2], \quad B = [B_1; B_2], \quad A B = A_1 B_1 + A_2 B_2

    Args:
      first: as `init_adapters` makes them.
      second: on the same matrices, and meant for the same scale.

    Returns:
      The adapters, of the summed rank.
    """
    others = items(second)

    def both(path: str, adapter: Adapter) -> Adapter:
        other = others[path]
        return {
            "a": jnp.concatenate([adapter["a"], other["a"]], axis=-1),
            "b": jnp.concatenate([adapter["b"], other["b"]], axis=-2),
        }

    return _each(both, first)


def count(adapters: Mapping[str, Any]) -> int:
    """Number of trained parameters."""
    return sum(adapter[name].size for adapter in items(adapters).values() for name in ("a", "b"))
