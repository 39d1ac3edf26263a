r"""Matrices in int8, for programs that read every weight for a few tokens, as decoding does.

Each output :math:`j` has a scale :math:`s_j = \max_i |W_{ij}| / 127`, and :math:`W_{ij}` becomes
:math:`s_j Q_{ij}` with the nearest integers Q.

XLA's CPU compiler has fast int8 products with int32 sums, but would convert the whole matrix to
float for inputs in float, and for a single row. So the inputs of a row x are integers, too:
:math:`x \approx t (a + b / 254)` with :math:`t = \max_i |x_i| / 127`, a the nearest integers, and b
what they leave. That makes two rows of one; both sums are exact, and an input is off by at most
t / 508. On accelerators, where a conversion is fused into the product, the inputs stay in float.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxalign.models import devices
from jaxalign.models.precision import precision
from jaxalign.records import AnyArray, record

PART = 2**18
"""Fewest bytes of a matrix that are worth a thread of their own."""


@record
class Int8Matrix:
    """A matrix of integers with a scale for each output, split by outputs.

    Attributes:
      parts: integers, a row for each output. XLA computes a product with one of them on one thread,
        and the products with several at the same time.
      scale: of each output.
    """

    parts: tuple[Int8[AnyArray, "*layers _ inputs"], ...]
    scale: Float[AnyArray, "*layers outputs"]


def quantise(kernel: Float[Array, "*layers inputs outputs"]) -> Int8Matrix:
    """The nearest matrix, or stack of matrices, of integers with a scale for each output."""
    kernel = jnp.swapaxes(kernel.astype(jnp.float32), -1, -2)
    largest = jnp.max(jnp.abs(kernel), axis=-1)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    integers = jnp.round(kernel / scale[..., None]).astype(jnp.int8)
    size = kernel.shape[-1] * kernel.shape[-2]
    number = max(1, min(os.cpu_count() or 1, size // PART)) if _on_cpu() else 1
    return Int8Matrix(parts=tuple(jnp.array_split(integers, number, axis=-2)), scale=scale)


def with_int8_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its kernels, except those of adapters, in int8."""

    def quantised(path: tuple[Any, ...], leaf: Array) -> Array | Int8Matrix:
        return quantise(leaf) if getattr(path[-1], "key", None) == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(quantised, params)


def product(
    x: Float[Array, "*rows inputs"], matrix: Int8Matrix, out_dtype: Any = None
) -> Float[Array, "*rows outputs"]:
    """The product x W.

    Args:
      x: rows.
      matrix: from `quantise`.
      out_dtype: of the result; None: that of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _of_integers(rows, matrix) if _on_cpu() else _of_floats(rows, matrix)
    return (y * matrix.scale[None]).astype(out_dtype or x.dtype).reshape(*x.shape[:-1], -1)


def _on_cpu() -> bool:
    return devices.platform() == "cpu"


def _of_integers(x: Array, matrix: Int8Matrix) -> Float[Array, "rows outputs"]:
    """The product x Q by integer products."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1.0) / 127
    scaled = x / unit
    nearest = jnp.round(scaled)
    rest = jnp.round((scaled - nearest) * 254)
    both = jnp.concatenate([nearest, rest]).astype(jnp.int8)
    few = len(both) <= 8  # the operand on the right is the one that XLA packs first
    contract = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    sums = [contract(part, both).T if few else contract(both, part) for part in matrix.parts]
    y = jnp.concatenate(sums, axis=1).astype(jnp.float32)
    return (y[: len(x)] + y[len(x) :] / 254) * unit


def _of_floats(x: Array, matrix: Int8Matrix) -> Float[Array, "rows outputs"]:
    """The product x Q in the dtype of `x`."""
    kernel = jnp.concatenate(matrix.parts).astype(x.dtype)
    return jax.lax.dot_general(
        x,
        kernel,
        (((1,), (1,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
