r"""Probes of parameters: per-pair Gram matrices as by-products of a backward pass.

Rows of a watched batch alternate: chosen, rejected, chosen, ... A *probe* is an array of zeros,
[pairs, 3], that is passed to each use of a parameter. The forward pass ignores it. The backward
pass computes each row's own gradient :math:`G_n` of the parameter, or its factors, and returns

.. math:: \left(\|G_w\|^2, \; \|G_l\|^2, \; \langle G_w, G_l \rangle\right)

of every pair as the probe's cotangent. Cotangents of a probe with several uses add up; so
`jax.grad` with respect to parameters and probes gives the gradient and the geometry of every pair,
under `scan`, `checkpoint` and shardings, by one backward pass.

A pair is a group of two *sides*. In general a group has S sides, one row after the other; a probe
is then [groups, products], with an entry for each of the S (S + 1) / 2 pairs of sides: the squared
norms, then the inner products in the order of `side_pairs`.

A probe lies beside its parameter in the tree, {"kernel": ..., "probe": ...}.

In packed rows several sides lie one after the other, each with a prompt of its own; `Spans` says
where. Products of rows and their backward pass are those of the packed rows; the sides' own
gradients are contractions over the tokens of their spans.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxalign.models import devices, gram_kernel, products
from jaxalign.models.precision import precision
from jaxalign.models.quantised import QuantisedMatrix
from jaxalign.records import AnyArray, record, static

# Operations that cost as much as one access to an element in memory.
CPU_BALANCE, ACCELERATOR_BALANCE = 16, 256
SIZES = 4
"""Number of sizes to which a CPU cuts the sides of packed rows; the largest is the longest."""


@record
class Spans:
    """Where each side of the pairs lies in packed rows; each row has equally many pairs, in turn.

    Attributes:
      start: of a side's tokens, in its row.
      length: number of its tokens; 0 for a copy of another pair.
      rows: number of rows.
      longest: at least any length.
    """

    start: Int[AnyArray, "*layers pairs 2"]
    length: Int[AnyArray, "*layers pairs 2"]
    rows: int = static(1)
    longest: int = static(1)

    @property
    def real(self) -> Bool[Array, "pairs 2 longest"]:
        """Which of a side's places hold a token."""
        return jnp.arange(self.longest)[None, None] < self.length[..., None]


@record
class Probe:
    """Zeros whose cotangent is the Gram matrix of each group's gradients, and where they lie.

    Attributes:
      gram: the zeros.
      spans: the sides of pairs in packed rows; None: the rows are the sides, in turn.
    """

    gram: Float[AnyArray, "*layers groups products"]
    spans: Spans | None = None


def matmul(
    x: Float[Array, "rows *length inputs"],
    kernel: Float[Array, "inputs outputs"] | QuantisedMatrix,
    probe: Probe | None = None,
) -> Float[Array, "rows *length outputs"]:
    """Product x W in the dtype of `x`; with a probe, the pairs' Gram matrices of W's gradients."""
    return _product(x, kernel) if probe is None else _matmul(x, kernel, probe)


def _product(x: Array, kernel: Array | QuantisedMatrix) -> Array:
    # One row per token: the kernel's gradient is then a plain product, too, which is faster on a
    # CPU than a contraction over two axes.
    y = products.product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1)


def spread(
    vector: Float[Array, "..."],
    shape: tuple[int, ...],
    dtype: Any,
    probe: Probe | None = None,
) -> Float[Array, "rows ..."]:
    """A small parameter broadcast to all rows; with a probe, as `matmul`."""
    if probe is None:
        return jnp.broadcast_to(vector.astype(dtype), shape)
    return _spread(shape, dtype, vector, probe)


def number_of_sides(probe: Float[Array, "*stack groups products"]) -> int:
    """The sides S of a group, from its S (S + 1) / 2 products."""
    return (math.isqrt(8 * probe.shape[-1] + 1) - 1) // 2


def side_pairs(sides: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second side of every product of a probe: each with itself, then all the others."""
    same = np.arange(sides)
    first, second = np.triu_indices(sides, 1)
    return np.concatenate([same, first]), np.concatenate([same, second])


def gram(*sides: Array) -> Float[Array, "*groups products"]:
    """Squared norms of the sides' gradients, [*groups, inputs, outputs], and inner products."""
    if len(sides) == 2:  # no product of matrices is worth it

        def inner(x: Array, y: Array) -> Array:
            return jnp.sum(jnp.sum(x * y, axis=-2), axis=-1)

        x, y = sides
        return jnp.stack([inner(x, x), inner(y, y), inner(x, y)], axis=-1)
    own = jnp.stack(sides, axis=-3)
    own = own.reshape(*own.shape[:-2], -1)
    products = jnp.matmul(own, own.swapaxes(-1, -2), precision=precision(own.dtype))
    return products[..., *side_pairs(len(sides))]


def factored_gram(
    of_inputs: Float[Array, "*groups products tokens tokens"],
    of_outputs: Float[Array, "*groups products tokens tokens"],
) -> Float[Array, "*groups products"]:
    r"""`gram` from the tokens' inner products, without computing a gradient.

    .. math:: \langle G_m, G_n \rangle = \sum_{s,t} (x_m[s] \cdot x_n[t]) \, (y_m[s] \cdot y_n[t])

    Args:
      of_inputs: `token_products` of the layer's inputs x.
      of_outputs: `token_products` of the cotangents y of its outputs.
    """
    return jnp.sum(of_inputs * of_outputs, axis=(-2, -1))


def token_products(
    x: Float[Array, "*groups sides tokens width"],
) -> Float[Array, "*groups products tokens tokens"]:
    """Inner products between tokens, for every pair of sides."""
    first, second = side_pairs(x.shape[-3])
    return jnp.einsum(
        "...ti,...ui->...tu",
        x[..., first, :, :],
        x[..., second, :, :],
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def forms_gradients(
    tokens: int, inputs: int, outputs: int, sides: int = 2, experts: int = 1
) -> bool:
    """Whether computing each row's gradient is cheaper than inner products between tokens.

    Gradients cost about four accesses to each of their elements (written, summed, contracted),
    inner products tokens squared dot products for every pair of sides. There is one gradient for
    each of several experts, into which the tokens are sorted.
    """
    balance = CPU_BALANCE if devices.platform() == "cpu" else ACCELERATOR_BALANCE
    products = sides * (sides + 1)
    each = experts * inputs * outputs
    return 4 * sides * balance * each < products * tokens**2 * (inputs + outputs)


def by_groups(
    x: Array, gram: Array, spans: Spans | None = None
) -> Shaped[Array, "groups sides tokens width"]:
    """[groups sides, ..., width] -> [groups, sides, tokens, width], as many as `gram` says.

    From packed rows: the tokens of each span, then any other tokens.

    Args:
      x: of all rows.
      gram: a probe's zeros.
      spans: of the sides in packed rows; None: rows are sides.
    """
    groups, sides = gram.shape[0], number_of_sides(gram)
    if spans is None:
        return x.reshape(groups, sides, -1, x.shape[-1])
    rows = x.reshape(spans.rows, -1, x.shape[-1])
    taken = jax.vmap(lambda row, at: row[at])(rows, _places(spans, rows.shape[1] - 1))
    return taken.reshape(groups, sides, spans.longest, x.shape[-1])


def cotangents_by_groups(
    dy: Array, gram: Array, spans: Spans | None = None
) -> Shaped[Array, "groups sides tokens width"]:
    """`by_groups`, with zeros after the end of a span."""
    own = by_groups(dy, gram, spans)
    return own if spans is None else jnp.where(spans.real[..., None], own, 0)


def in_rows(
    x: Float[Array, "pairs 2 longest width"], spans: Spans, length: int
) -> Float[Array, "rows length width"]:
    """The tokens of each span, back in packed rows of this length."""
    real, at = spans.real.reshape(spans.rows, -1), _places(spans, length - 1)
    values = x.reshape(spans.rows, -1, x.shape[-1])
    nothing = jnp.zeros((length, x.shape[-1]), x.dtype)
    return jax.vmap(lambda at, x: nothing.at[at].add(x, mode="drop"))(
        jnp.where(real, at, length), values
    )


def _places(spans: Spans, last: int) -> Int[Array, "rows tokens"]:
    """The tokens of the spans of each row, one span after the other."""
    at = spans.start[..., None] + jnp.arange(spans.longest)[None, None]
    return jnp.minimum(at, last).reshape(spans.rows, -1)


def lengths_of(spans: Spans | None) -> Int[Array, " pairs"] | None:
    """The length of each pair's longer side; None: rows are not packed."""
    return None if spans is None else spans.length.max(1)


def cut(function: Callable[[int], Any], longest: int, length: Int[Array, ""] | None) -> Any:
    """The function of a number of tokens: the smallest of a few that is at least `length`.

    Args:
      function: number of tokens -> arrays of the same shapes.
      longest: the largest number.
      length: the least number; None: `longest`.
    """
    if length is None:
        return function(longest)
    sizes = sorted({-(-longest * n // SIZES) for n in range(1, SIZES + 1)})
    number = jnp.searchsorted(jnp.array(sizes), length)
    return jax.lax.switch(number, [functools.partial(function, size) for size in sizes])


def row_gradients(inputs: Array, cotangents: Array) -> list[Array]:
    """The gradients of a matrix from each row of a group, in float32."""
    return [products.kernel_gradient(x, dy) for x, dy in zip(inputs, cotangents, strict=True)]


@jax.custom_vjp
def _matmul(x: Array, kernel: Array, probe: Probe) -> Array:
    return _product(x, kernel)


def _matmul_fwd(x, kernel, probe):
    return _matmul(x, kernel, probe), (x, kernel, probe)


def _matmul_bwd(saved, dy):
    x, kernel, probe = saved
    at, spans, sides = precision(x.dtype), probe.spans, number_of_sides(probe.gram)
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = products.transposed_product(flat_dy, kernel).reshape(x.shape)
    xs, dys = by_groups(x, probe.gram, spans), cotangents_by_groups(dy, probe.gram, spans)
    tokens, (inputs, outputs) = len(flat_x) // (len(xs) * sides), kernel.shape
    product = functools.partial(jnp.einsum, precision=at, preferred_element_type=jnp.float32)

    if sides == 2 and gram_kernel.fits(x.dtype, inputs, outputs):
        total, geometry = gram_kernel.gradient_and_gram(xs, dys)
    elif not forms_gradients(tokens, inputs, outputs, sides):
        geometry = _factored(xs, dys, spans)
        total = products.kernel_gradient(flat_x, flat_dy)
    elif devices.is_single_cpu():

        def of_group(total, factors):
            x, dy, length = factors
            own = cut(lambda n: row_gradients(x[:, :n], dy[:, :n]), x.shape[1], length)
            return total + sum(own[1:], own[0]), gram(*own)

        total, geometry = jax.lax.scan(
            of_group, jnp.zeros(kernel.shape), (xs, dys, lengths_of(spans))
        )
    else:
        own = product("pnti,pnto->pnio", xs, dys)
        total, geometry = own.sum((0, 1)), gram(*jnp.moveaxis(own, 1, 0))
    return dx, total.astype(kernel.dtype), Probe(gram=geometry)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _factored(xs: Array, dys: Array, spans: Spans | None) -> Float[Array, "groups products"]:
    """`factored_gram` of all groups; on a CPU, of packed ones one by one, as long as they are."""
    if spans is None or not devices.is_single_cpu():
        return factored_gram(token_products(xs), token_products(dys))

    def of_pair(inputs):
        x, dy, length = inputs

        def of_tokens(n):
            return factored_gram(token_products(x[:, :n]), token_products(dy[:, :n]))

        return cut(of_tokens, x.shape[1], length)

    return jax.lax.map(of_pair, (xs, dys, lengths_of(spans)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(shape, dtype, vector, probe):
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _spread_fwd(shape, dtype, vector, probe):
    return _spread(shape, dtype, vector, probe), (vector, probe)


def _spread_bwd(shape, dtype, saved, dy):
    vector, probe = saved
    spans, missing = probe.spans, len(shape) - vector.ndim
    groups, sides = probe.gram.shape[0], number_of_sides(probe.gram)
    first = 1 if spans is None else 2  # axes of rows, or of rows and tokens
    rows = dy.astype(jnp.float32).sum(range(first, missing))
    if spans is None:
        own = rows.reshape(groups, sides, 1, -1)
        total = own.sum((0, 1))
    else:
        rows = rows.reshape(spans.rows, shape[1], -1)
        own = _sums(rows, spans).reshape(groups, sides, 1, -1)
        total = rows.sum((0, 1))
    total = total.reshape(vector.shape).astype(vector.dtype)
    return total, Probe(gram=gram(*jnp.moveaxis(own, 1, 0)))


_spread.defvjp(_spread_fwd, _spread_bwd)


def _sums(x: Float[Array, "rows length width"], spans: Spans) -> Float[Array, "rows sides width"]:
    """Sums over the tokens of each span."""
    place = jnp.arange(x.shape[1])[None, None]
    start, length = (z.reshape(spans.rows, -1, 1) for z in (spans.start, spans.length))
    inside = (place >= start) & (place < start + length)
    return jnp.einsum(
        "rsl,rlw->rsw", inside.astype(jnp.float32), x, precision=jax.lax.Precision.HIGHEST
    )


def with_probes(
    params: Mapping[str, Any], probes: Mapping[str, Any], spans: Spans | None = None
) -> dict[str, Any]:
    """The parameters' tree with every probe beside the parameters that it watches.

    Args:
      params: nested dict of arrays, or adapters.
      probes: of `probes_of`.
      spans: of the pairs in packed rows; None: rows alternate, chosen and rejected.
    """
    merged = dict(params)
    for name, probe in probes.items():
        if isinstance(probe, Mapping):
            merged[name] = with_probes(params[name], probe, spans)
        elif name == "probe":
            merged[name] = Probe(gram=probe, spans=_of_layers(spans, probe.shape[:-2]))
        else:
            merged[name] = probe
    return merged


def _of_layers(spans: Spans | None, layers: tuple[int, ...]) -> Spans | None:
    """The same spans for each layer of a stack."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*layers, *x.shape)), spans)


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
