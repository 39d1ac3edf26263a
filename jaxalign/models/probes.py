r"""Probes of parameters: per-pair Gram matrices as by-products of a backward pass.

Rows of a watched batch alternate: chosen, rejected, chosen, ... A *probe* is an array of zeros,
[pairs, 3], that is passed to each use of a parameter. The forward pass ignores it. The backward
pass computes each row's own gradient :math:`G_n` of the parameter, or its factors, and returns

.. math:: \left(\|G_w\|^2, \; \|G_l\|^2, \; \langle G_w, G_l \rangle\right)

of every pair as the probe's cotangent. Cotangents of a probe with several uses add up; so
`jax.grad` with respect to parameters and probes gives the gradient and the geometry of every pair,
under `scan`, `checkpoint` and shardings, by one backward pass.

A probe lies beside its parameter in the tree, {"kernel": ..., "probe": ...}.

In packed rows several sides lie one after the other, each with a prompt of its own; `Spans` says
where. Products of rows and their backward pass are those of the packed rows; the sides' own
gradients are contractions over the tokens of their spans.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxalign.models import devices, gram_kernel, products
from jaxalign.models.precision import precision
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
    """Zeros whose cotangent is the Gram matrix of each pair's gradients, and where the pairs lie.

    Attributes:
      gram: the zeros.
      spans: the sides in packed rows; None: rows alternate, chosen and rejected.
    """

    gram: Float[AnyArray, "*layers pairs 3"]
    spans: Spans | None = None


def matmul(
    x: Float[Array, "rows *length inputs"],
    kernel: Float[Array, "inputs outputs"],
    probe: Probe | None = None,
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
    probe: Probe | None = None,
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


def forms_gradients(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether computing each row's gradient is cheaper than inner products between tokens.

    Gradients cost about eight accesses to each of their elements (written, summed, and contracted
    three times), inner products three times tokens squared dot products.
    """
    balance = CPU_BALANCE if devices.platform() == "cpu" else ACCELERATOR_BALANCE
    return 8 * balance * inputs * outputs < 6 * tokens**2 * (inputs + outputs)


def by_pairs(
    x: Array, pairs: int, spans: Spans | None = None
) -> Shaped[Array, "pairs 2 tokens width"]:
    """[2 pairs, ..., width] -> [pairs, 2, tokens, width].

    From packed rows: the tokens of each span, then any other tokens.
    """
    if spans is None:
        return x.reshape(pairs, 2, -1, x.shape[-1])
    rows = x.reshape(spans.rows, -1, x.shape[-1])
    taken = jax.vmap(lambda row, at: row[at])(rows, _places(spans, rows.shape[1] - 1))
    return taken.reshape(pairs, 2, spans.longest, x.shape[-1])


def cotangents_by_pairs(
    dy: Array, pairs: int, spans: Spans | None = None
) -> Shaped[Array, "pairs 2 tokens width"]:
    """`by_pairs`, with zeros after the end of a span."""
    own = by_pairs(dy, pairs, spans)
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


def row_gradients(inputs: Array, cotangents: Array) -> tuple[Array, Array]:
    """The gradients of a matrix from the chosen and from the rejected row of a pair, in float32."""
    chosen, rejected = (products.kernel_gradient(inputs[n], cotangents[n]) for n in (0, 1))
    return chosen, rejected


@jax.custom_vjp
def _matmul(x: Array, kernel: Array, probe: Probe) -> Array:
    return _product(x, kernel)


def _matmul_fwd(x, kernel, probe):
    return _matmul(x, kernel, probe), (x, kernel, probe)


def _matmul_bwd(saved, dy):
    x, kernel, probe = saved
    at, spans, pairs = precision(x.dtype), probe.spans, probe.gram.shape[0]
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = products.transposed_product(flat_dy, kernel).reshape(x.shape)
    xs, dys = by_pairs(x, pairs, spans), cotangents_by_pairs(dy, pairs, spans)
    product = functools.partial(jnp.einsum, precision=at, preferred_element_type=jnp.float32)

    if gram_kernel.fits(x.dtype, *kernel.shape):
        total, geometry = gram_kernel.gradient_and_gram(xs, dys)
    elif not forms_gradients(len(flat_x) // (2 * pairs), *kernel.shape):
        geometry = _factored(xs, dys, spans)
        total = products.kernel_gradient(flat_x, flat_dy)
    elif devices.is_single_cpu():

        def of_pair(total, inputs):
            x, dy, length = inputs
            gradients = cut(lambda n: row_gradients(x[:, :n], dy[:, :n]), x.shape[1], length)
            return total + (gradients[0] + gradients[1]), gram(*gradients)

        total, geometry = jax.lax.scan(
            of_pair, jnp.zeros(kernel.shape), (xs, dys, lengths_of(spans))
        )
    else:
        own = product("pnti,pnto->pnio", xs, dys)
        total, geometry = own.sum((0, 1)), gram(own[:, 0], own[:, 1])
    return dx, total.astype(kernel.dtype), Probe(gram=geometry)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _factored(xs: Array, dys: Array, spans: Spans | None) -> Float[Array, "pairs 3"]:
    """`factored_gram` of all pairs; on a CPU, of packed ones one by one, as long as they are."""
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
    pairs, spans, missing = probe.gram.shape[0], probe.spans, len(shape) - vector.ndim
    first = 1 if spans is None else 2  # axes of rows, or of rows and tokens
    rows = dy.astype(jnp.float32).sum(range(first, missing))
    if spans is None:
        own = rows.reshape(pairs, 2, 1, -1)
        total = own.sum((0, 1))
    else:
        rows = rows.reshape(spans.rows, shape[1], -1)
        own = _sums(rows, spans).reshape(pairs, 2, 1, -1)
        total = rows.sum((0, 1))
    total = total.reshape(vector.shape).astype(vector.dtype)
    return total, Probe(gram=gram(own[:, 0], own[:, 1]))


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
