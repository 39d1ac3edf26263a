r"""Probes of parameters: per-pair Gram matrices as by-products of a backward pass.

Rows of a watched batch alternate: chosen, rejected, chosen, ... A *probe* is an array of zeros,
[pairs, 3], that is passed to each use of a parameter. The forward pass ignores it. The backward
pass computes each row's own gradient :math:`G_n` of the parameter, or its factors, and returns

.. math:: \left(\|G_w\|^2, \; \|G_l\|^2, \; \langle G_w, G_l \rangle\right)

of every pair as the probe's cotangent. Cotangents of a probe with several uses add up; so
`jax.grad` with respect to parameters and probes gives the gradient and the geometry of every pair,
under `scan`, `checkpoint` and shardings, by one backward pass.

A probe lies beside its parameter in the tree, {"kernel": ..., "probe": ...}.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models import devices, gram_kernel, products
from jaxalign.models.precision import precision

# Operations that cost as much as one access to an element in memory.
CPU_BALANCE, ACCELERATOR_BALANCE = 16, 256


def matmul(
    x: Float[Array, "rows *length inputs"],
    kernel: Float[Array, "inputs outputs"],
    probe: Float[Array, "pairs 3"] | None = None,
) -> Float[Array, "rows *length outputs"]:
    """Product x W in the dtype of `x`; with a probe, the pairs' Gram matrices of W's gradients."""
    return _product(x, kernel) if probe is None else _matmul(x, kernel, probe)


def _product(x: Array, kernel: Array) -> Array:
    # One row per token: the kernel's gradient is then a plain product, too, which is faster on a
    # CPU than a contraction over two axes.
    y = products.product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1)


def spread(
    vector: Float[Array, "..."],
    shape: tuple[int, ...],
    dtype: Any,
    probe: Float[Array, "pairs 3"] | None = None,
) -> Float[Array, "rows ..."]:
    """A small parameter broadcast to all rows; with a probe, as `matmul`."""
    if probe is None:
        return jnp.broadcast_to(vector.astype(dtype), shape)
    return _spread(shape, dtype, vector, probe)


def gram(
    first: Float[Array, "*pairs inputs outputs"], second: Float[Array, "*pairs inputs outputs"]
) -> Float[Array, "*pairs 3"]:
    """Squared norms of the first and the second gradient of each pair, and their inner product."""

    def inner(x: Array, y: Array) -> Array:
        return jnp.sum(jnp.sum(x * y, axis=-2), axis=-1)

    return jnp.stack([inner(first, first), inner(second, second), inner(first, second)], axis=-1)


def factored_gram(
    of_inputs: tuple[Array, Array], of_outputs: tuple[Array, Array]
) -> Float[Array, "*pairs 3"]:
    r"""`gram` from the tokens' inner products, without computing a gradient.

    .. math:: \langle G_m, G_n \rangle = \sum_{s,t} (x_m[s] \cdot x_n[t]) \, (y_m[s] \cdot y_n[t])

    Args:
      of_inputs: `token_products` of the layer's inputs x.
      of_outputs: `token_products` of the cotangents y of its outputs.
    """
    own, cross = (jnp.sum(x * y, axis=(-2, -1)) for x, y in zip(of_inputs, of_outputs, strict=True))
    return jnp.concatenate([own, cross[..., None]], axis=-1)


def token_products(
    x: Float[Array, "*pairs 2 tokens width"],
) -> tuple[Float[Array, "*pairs 2 tokens tokens"], Float[Array, "*pairs tokens tokens"]]:
    """Inner products between tokens: within chosen and rejected, and chosen with rejected."""
    product = functools.partial(
        jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
    own = product("...ti,...ui->...tu", x, x)
    return own, product("...ti,...ui->...tu", x[..., 0, :, :], x[..., 1, :, :])


def forms_gradients(tokens: int, inputs: int, outputs: int, groups: int = 1) -> bool:
    """Whether computing each row's gradient is cheaper than inner products between tokens.

    Gradients cost about eight accesses to each of their elements (written, summed, and contracted
    three times), inner products three times tokens squared dot products. There is one gradient for
    each of several groups, into which the tokens are sorted.
    """
    balance = CPU_BALANCE if devices.platform() == "cpu" else ACCELERATOR_BALANCE
    return 8 * balance * groups * inputs * outputs < 6 * tokens**2 * (inputs + outputs)


def by_pairs(x: Array, pairs: int) -> Float[Array, "pairs 2 tokens width"]:
    """[2 pairs, ..., width] -> [pairs, 2, tokens, width]."""
    return x.reshape(pairs, 2, -1, x.shape[-1])


def row_gradients(inputs: Array, cotangents: Array) -> tuple[Array, Array]:
    """The gradients of a matrix from the chosen and from the rejected row of a pair, in float32."""
    chosen, rejected = (products.kernel_gradient(inputs[n], cotangents[n]) for n in (0, 1))
    return chosen, rejected


@jax.custom_vjp
def _matmul(x: Array, kernel: Array, probe: Array) -> Array:
    return _product(x, kernel)


def _matmul_fwd(x, kernel, probe):
    return _matmul(x, kernel, probe), (x, kernel, probe)


def _matmul_bwd(saved, dy):
    x, kernel, probe = saved
    at, pairs = precision(x.dtype), probe.shape[0]
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = products.transposed_product(flat_dy, kernel).reshape(x.shape)
    xs, dys = by_pairs(x, pairs), by_pairs(dy, pairs)
    product = functools.partial(jnp.einsum, precision=at, preferred_element_type=jnp.float32)

    if gram_kernel.fits(x.dtype, *kernel.shape):
        total, geometry = gram_kernel.gradient_and_gram(xs, dys)
    elif not forms_gradients(xs.shape[2], *kernel.shape):
        geometry = factored_gram(token_products(xs), token_products(dys))
        total = products.kernel_gradient(flat_x, flat_dy)
    elif devices.is_single_cpu():

        def of_pair(total, inputs):
            chosen, rejected = row_gradients(*inputs)
            return total + (chosen + rejected), gram(chosen, rejected)

        total, geometry = jax.lax.scan(of_pair, jnp.zeros(kernel.shape), (xs, dys))
    else:
        own = product("pnti,pnto->pnio", xs, dys)
        total, geometry = own.sum((0, 1)), gram(own[:, 0], own[:, 1])
    return dx, total.astype(kernel.dtype), geometry


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(shape, dtype, vector, probe):
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _spread_fwd(shape, dtype, vector, probe):
    return _spread(shape, dtype, vector, probe), (vector, probe)


def _spread_bwd(shape, dtype, saved, dy):
    vector, probe = saved
    missing = len(shape) - vector.ndim
    rows = dy.astype(jnp.float32).sum(range(1, missing)) if missing > 1 else dy.astype(jnp.float32)
    own = rows.reshape(probe.shape[0], 2, 1, -1)
    total = own.sum((0, 1)).reshape(vector.shape).astype(vector.dtype)
    return total, gram(own[:, 0], own[:, 1])


_spread.defvjp(_spread_fwd, _spread_bwd)


def with_probes(params: Mapping[str, Any], probes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters' tree with every probe beside the parameters that it watches."""
    merged = dict(params)
    for name, probe in probes.items():
        merged[name] = with_probes(params[name], probe) if isinstance(probe, Mapping) else probe
    return merged


def probes_of(params: Mapping[str, Any], zero: Callable[..., Any]) -> dict[str, Any]:
    """A tree of probes for every node of a tree of parameters that holds arrays.

    Args:
      params: nested dict of arrays, or adapters.
      zero: (path of a node, its arrays) -> the probe, or a dict of several.
    """

    def walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        inner = {k: walk(v, (*path, k)) for k, v in tree.items() if isinstance(v, Mapping)}
        arrays = {k: v for k, v in tree.items() if not isinstance(v, Mapping)}
        return inner | (zero(path, arrays) if arrays else {})

    return walk(params, ())
