"""Single kernels beside what they replace: attention of all kinds of rows, gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.workloads import Row, throughput_row, timed
from jaxalign.models import gram_kernel, probes
from jaxalign.models.attention import attention
from jaxalign.models.devices import compiling_for
from jaxalign.models.sequences import sequences_of


def attention_kernels(size: Size) -> dict[str, Row]:
    """Attention with its gradient, one layer of the DPO step: by cuDNN and in blocks.

    Plain rows; rows of two segments; joint rows, whose prompt is three quarters; all pairs packed
    in one row.
    """
    half, quarter = size.length // 2, size.length // 4
    plain = {"rows": 2 * size.pairs, "length": size.length}
    result = _attention(size, "plain", **plain)
    result |= _attention(size, "segments", **plain, parts=((0, half, size.length - half),))
    joint = (size.length - quarter, quarter, quarter)
    result |= _attention(size, "joint", rows=size.pairs, length=sum(joint), parts=(joint,))
    packed = (half, quarter, quarter)
    length = size.pairs * size.length
    return result | _attention(size, "packed", rows=1, length=length, parts=(packed,) * size.pairs)


def _attention(
    size: Size, name: str, *, rows: int, length: int, parts: tuple[tuple[int, ...], ...] = ()
) -> dict[str, Row]:
    """One kind of row: `parts` are the sizes of prefix and responses of the pairs of a row."""
    shape, device = inputs.SHAPES[size.model], jax.devices()[0]
    width = shape.width // shape.heads
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (rows, length, heads, width), jnp.bfloat16)
        for key, heads in zip(keys, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True)
    )
    layout: dict[str, Any] = {}
    if parts:
        ids = 1 + np.arange(3 * len(parts))
        segment = jnp.asarray(np.tile(np.repeat(ids, np.ravel(parts)), (rows, 1)), jnp.int32)
        layout = {"segment_ids": segment}
        if name != "segments":
            longest = max(pair[0] + max(pair[1:]) for pair in parts)
            layout |= {
                "prefix_ids": (segment - 1) // 3 * 3 + 1,
                "reach": max(map(sum, parts)),
                "sequences": sequences_of(segment, len(parts), 2, longest),
            }

    def total(q: Any, k: Any, v: Any, implementation: str) -> jax.Array:
        mixed = attention(q, k, v, scale=width**-0.5, implementation=implementation, **layout)
        return jnp.sum(mixed.astype(jnp.float32))

    # queries with keys and weights with values, forward 1 and backward 2, half of it causal
    flops = None if parts else 3 * 2 * rows * length**2 * shape.heads * width
    result: dict[str, Row] = {}
    for way in ("cudnn", "blocked"):
        if way == "cudnn" and device.platform != "gpu":
            note = f"not measured: there is no cuDNN on a {device.platform}"
            result[f"{name}, {way}"] = {"note": note}
            continue
        run = jax.grad(functools.partial(total, implementation=way), argnums=(0, 1, 2))
        seconds = _seconds(size, run, q, k, v)
        result[f"{name}, {way}"] = throughput_row(device, seconds, rows * length, flops)
    return result


def gradient_kernels(size: Size) -> dict[str, Row]:
    """A matrix's gradient alone, and with each pair's Gram matrix: by the kernel and by products.

    The matrices of the MLP and of the queries, on the tokens of the DPO step.
    """
    shape, device = inputs.SHAPES[size.model], jax.devices()[0]
    result: dict[str, Row] = {}
    for inner, outer in ((shape.width, shape.mlp_width), (shape.width, shape.width)):
        x, dy = (
            jax.random.normal(jax.random.key(n), (size.pairs, 2, size.length, many), jnp.bfloat16)
            for n, many in enumerate((inner, outer))
        )
        ways = {"gradient alone": _gradient, "of every row": _of_rows}
        if gram_kernel.fits(x.dtype, inner, outer):
            ways["one kernel"] = gram_kernel.gradient_and_gram
        for way, run in ways.items():
            tokens = 2 * size.pairs * size.length
            row = throughput_row(device, _seconds(size, run, x, dy), tokens)
            result[f"{inner} x {outer}, {way}"] = row
    return result


def _gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.einsum("pnti,pnto->io", x, dy, preferred_element_type=jnp.float32)


def _of_rows(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    own = jnp.einsum("pnti,pnto->pnio", x, dy, preferred_element_type=jnp.float32)
    return own.sum((0, 1)), probes.gram(own[:, 0], own[:, 1])


def _seconds(size: Size, run: Callable[..., Any], *arrays: jax.Array) -> list[float]:
    """Seconds of each counted run of a compiled function."""
    with compiling_for(jax.devices()[0].platform, 1):
        compiled = jax.jit(run).lower(*arrays).compile()
    return [timed(compiled, *arrays) for _ in range(size.skip + size.steps)][size.skip :]
