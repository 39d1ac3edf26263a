r"""A GPU's kernel: the gradient of a matrix, and each pair's Gram matrix of it, in one pass.

The gradient of W in x W is a sum over the rows of a batch, :math:`\sum_n x_n^T dy_n`. The kernel
holds the terms of both rows of a pair beside the sum, in registers, tile by tile. So their norms
and inner products cost no more memory and hardly more time than the sum alone, where an array of
all rows' gradients is sixteen matrices for eight pairs. `python -m benchmarks.gpu` measures it.

It is written with the Triton backend of Pallas, which jax has deprecated; `fits` is false in a
version of jax without it, and the same numbers are then computed by plain products.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jaxtyping import Array, Float

from jaxalign.models import devices

TOKENS = 64
"""Tokens that a step of the kernel reads; rows are padded to a multiple."""
TILE, SMALL_TILE = 128, 64
WARPS, STAGES = 8, 4
PROCESSORS = 132
"""Of an H100 or H200: smaller tiles where there would be fewer tiles than processors."""


def fits(dtype: Any, inputs: int, outputs: int) -> bool:
    """Whether the kernel computes gradients of such a matrix, in this dtype, on this device."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    whole = inputs % SMALL_TILE == 0 and outputs % SMALL_TILE == 0
    alone = devices.platform() == "gpu" and devices.device_count() == 1
    return alone and half and whole and _triton() is not None


def gradient_and_gram(
    x: Float[Array, "pairs 2 tokens inputs"],
    dy: Float[Array, "pairs 2 tokens outputs"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "inputs outputs"], Float[Array, "pairs 3"]]:
    """The gradient of all rows, and norms and inner product of each pair's gradients.

    Args:
      x: what was multiplied with the matrix; its sizes are multiples of 64.
      dy: cotangents of the product, in the dtype of `x`.
      interpret: run the kernel on any device, slowly.

    Returns:
      Both in float32; the second as `probes.gram` returns it.
    """
    pairs, inputs, outputs = len(x), x.shape[-1], dy.shape[-1]
    missing = -x.shape[2] % TOKENS
    x, dy = (jnp.pad(z, ((0, 0), (0, 0), (0, missing), (0, 0))) for z in (x, dy))
    height, width = _tile(inputs, outputs)
    grid = inputs // height, outputs // width

    def columns(size: int, axis: int) -> pallas.BlockSpec:
        block = pairs, 2, x.shape[2], size
        return pallas.BlockSpec(block, lambda *tile: (0, 0, 0, tile[axis]))

    triton: Any = _triton()
    total, geometry = pallas.pallas_call(
        functools.partial(_kernel, triton),
        grid=grid,
        in_specs=[columns(height, 0), columns(width, 1)],
        out_specs=[
            pallas.BlockSpec((height, width), lambda row, column: (row, column)),
            pallas.BlockSpec((None, None, pairs, 4), lambda row, column: (row, column, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((inputs, outputs), jnp.float32),
            jax.ShapeDtypeStruct((*grid, pairs, 4), jnp.float32),  # sizes are powers of two
        ],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(x, dy)
    return total, jnp.sum(geometry[..., :3], axis=(0, 1))


def _kernel(triton: Any, x: Any, dy: Any, total: Any, geometry: Any) -> None:
    """One tile of the gradient; `geometry` gets the tile's part of each pair's Gram matrix."""
    pairs, _, tokens, height = x.shape
    zeros = jnp.zeros((height, dy.shape[-1]), jnp.float32)

    def of_row(pair: Array, side: int) -> Array:
        def add(step: Array, gradient: Array) -> Array:
            some = pallas.ds(step * TOKENS, TOKENS)
            return gradient + triton.dot(x[pair, side, some, :].T, dy[pair, side, some, :])

        return jax.lax.fori_loop(0, tokens // TOKENS, add, zeros)

    def of_pair(pair: Array, whole: Array) -> Array:
        chosen, rejected = of_row(pair, 0), of_row(pair, 1)
        geometry[pair, 0] = jnp.sum(chosen * chosen)
        geometry[pair, 1] = jnp.sum(rejected * rejected)
        geometry[pair, 2] = jnp.sum(chosen * rejected)
        return whole + chosen + rejected

    total[...] = jax.lax.fori_loop(0, pairs, of_pair, zeros)


def _tile(inputs: int, outputs: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    height, width = (TILE if size % TILE == 0 else SMALL_TILE for size in (inputs, outputs))
    if (inputs // height) * (outputs // width) < PROCESSORS:
        width = SMALL_TILE
    return height, width


@functools.cache
def _triton() -> ModuleType | None:
    """The Triton backend of Pallas; None: this jax has none."""
    try:
        return importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return None
