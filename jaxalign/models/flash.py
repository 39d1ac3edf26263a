r"""Attention on TPUs: three Pallas kernels, forward and backward, for every mask of a decoder.

Scores exist one block of queries by one block of keys at a time, in the chip's vector memory; the
backward pass computes them again from the log-sum-exp :math:`\ell_t` of each query's scores:

.. math:: P_{ts} = e^{S_{ts} - \ell_t}, \quad
   dS_{ts} = P_{ts} \Big(\sum_d dO_{td} V_{sd} - \sum_d dO_{td} O_{td}\Big)

Each block reads only the blocks of which it sees a position: their numbers are listed before the
kernel starts, from the smallest and largest segment, place and position of each block.

Reference: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), algorithms 1 and 2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices
from jaxalign.models.precision import precision

OUTPUT = "attention_output"
"""Name of what rematerialisation saves of attention."""
LANES, SUBLANES = 128, 8
"""Sides of the tiles in which a TPU keeps arrays of 32 bits."""
HIDDEN = -0.7 * float(np.finfo(np.float32).max)
"""Score of a key that a query does not see."""
PLACE, SEGMENT, PREFIX, POSITION = range(4)
"""Rows of the array of marks, which has `SUBLANES` rows."""
CONTRACT_LAST, CONTRACT_INNER = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


class Form(NamedTuple):
    """What is known before the arrays are."""

    scale: float
    cap: float | None
    window: int | None
    reach: int | None
    """No query sees a key as many or more places before it; None: unknown."""
    segmented: bool
    """Whether a row may have more than one segment."""
    prefixed: bool
    """Whether a segment may continue another one."""
    size: int
    """Number of queries, and of keys, in a block."""
    interpret: bool
    """Whether the kernels are computed by XLA, on any device."""

    def width(self, blocks: int) -> int:
        """The largest number of blocks that one may see, of a row's."""
        if self.reach is None:
            return blocks
        return min(blocks, 1 - (1 - self.reach) // self.size)


def whole_rows(q: Array, k: Array) -> bool:
    """Whether each device has whole rows and groups of heads, as far as the sharding is known."""
    sharding = devices.head_sharding()
    if sharding is None:
        return True
    rows, length, heads = (devices.parts(sharding, axis) for axis in range(3))
    return q.shape[0] % rows == 0 and length == 1 and k.shape[2] % heads == 0


def flash_attention(
    q: Float[Array, "batch length heads head_width"],
    k: Float[Array, "batch length kv_heads head_width"],
    v: Float[Array, "batch length kv_heads head_width"],
    *,
    scale: float,
    segments: Int[Array, "batch length"] | None,
    prefixes: Int[Array, "batch length"] | None,
    positions: Int[Array, "batch length"] | None,
    reach: int | None,
    window: int | None,
    cap: float | None,
    sinks: Float[Array, "batch length heads"] | None = None,
    block: int,
) -> Float[Array, "batch length heads head_width"]:
    """Causal attention by the kernels, on each device for its own rows and heads.

    Arguments are those of `jaxalign.models.attention.attention`; `whole_rows` holds for the arrays.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor on query-key products.
      segments: of each position; None: one.
      prefixes: the segment that a position's own segment continues.
      positions: used for the window; by default the index in the row.
      reach: no position sees one as many or more places before it; None: unknown.
      window: a position sees itself and the `window - 1` positions before it.
      cap: soft cap on scores.
      sinks: each query's score of attending to no key.
      block: largest number of queries in a block; on a TPU a multiple of 128.
    """
    length = q.shape[1]
    size = _size(length, block)
    if prefixes is None:
        positions, reach = None, window
    form = Form(
        scale=scale,
        cap=cap,
        window=window,
        reach=reach,
        segmented=segments is not None,
        prefixed=prefixes is not None,
        size=size,
        interpret=devices.platform() != "tpu",
    )
    place = jnp.arange(length)[None]
    marks = [place, segments, prefixes, place if positions is None else positions]
    rows = max(1 if mark is None else mark.shape[0] for mark in marks)
    marks = [
        jnp.zeros((rows, length), jnp.int32)
        if mark is None
        else jnp.broadcast_to(mark, (rows, length)).astype(jnp.int32)
        for mark in [*marks, *[None] * (SUBLANES - len(marks))]
    ]
    run = functools.partial(_by_heads, form)
    sharding = devices.head_sharding()
    if sharding is not None:
        spec = sharding.spec
        marked = P(spec[0] if rows > 1 else None)
        of_sinks = () if sinks is None else (P(*spec[:3]),)
        run = jax.shard_map(
            run,
            mesh=sharding.mesh,
            in_specs=(spec, spec, spec, marked, *of_sinks),
            out_specs=spec,
            check_vma=False,
        )
    return run(q, k, v, jnp.stack(marks, axis=1), *(() if sinks is None else (sinks,)))


def _size(length: int, block: int) -> int:
    """The number of queries in a block: as few padded ones as whole tiles allow."""
    blocks = -(-length // block)
    tile = min(LANES, block)
    return -(-length // (blocks * tile)) * tile


def _by_heads(
    form: Form, q: Array, k: Array, v: Array, marks: Array, sinks: Array | None = None
) -> Array:
    """Attention of arrays [batch, length, heads, width], padded to whole blocks."""
    length = q.shape[1]
    padding = -length % form.size

    def prepared(x: Array) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    places = jnp.arange(length, length + padding)  # behind all others: no real query sees them
    marks = jnp.pad(marks, ((0, 0), (0, 0), (0, padding)))
    marks = marks.at[:, PLACE, length:].set(places).at[:, POSITION, length:].set(places)
    if sinks is not None:
        sinks = jnp.swapaxes(prepared(sinks[..., None]), 2, 3).astype(jnp.float32)
    out = _attention(form, prepared(q), prepared(k), prepared(v), marks, sinks)
    return jnp.swapaxes(out[:, :, :length], 1, 2)


def _visible(form: Form, marks: Array) -> Bool[Array, "rows queries keys"]:
    """Which blocks of keys have one that a query of a block may see; too many do no harm."""
    blocks = marks.reshape(*marks.shape[:2], -1, form.size)
    low, high = blocks.min(-1), blocks.max(-1)

    def least_distance(mark: int) -> Array:
        return low[:, mark, :, None] - high[:, mark, None, :]

    def overlap(of_query: int) -> Array:
        above = low[:, of_query, :, None] > high[:, SEGMENT, None, :]
        below = high[:, of_query, :, None] < low[:, SEGMENT, None, :]
        return ~(above | below)

    seen = high[:, PLACE, :, None] >= low[:, PLACE, None, :]
    if form.segmented:
        seen &= overlap(SEGMENT) | overlap(PREFIX) if form.prefixed else overlap(SEGMENT)
    if form.reach is not None:
        seen &= least_distance(PLACE) < form.reach
    if form.window is not None:
        seen &= least_distance(POSITION) < form.window
    return seen


def _listed(form: Form, seen: Bool[Array, "rows blocks others"]) -> tuple[Array, Array]:
    """The blocks that each block sees, the last one repeated, and their number; both flat."""
    number = seen.sum(-1, dtype=jnp.int32)
    order = jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32)
    step = jnp.arange(form.width(seen.shape[-1]))[None, None]
    order = jnp.take_along_axis(order, jnp.minimum(step, number[..., None] - 1), axis=-1)
    return order.reshape(-1), number.reshape(-1)


def _sees(form: Form, of_query: Any, of_key: Any) -> Array:
    """Which keys a query sees, of the marks of some queries and keys, one of them transposed."""
    seen = of_query(PLACE) >= of_key(PLACE)
    if form.segmented:
        same = of_query(SEGMENT) == of_key(SEGMENT)
        seen &= same | (of_query(PREFIX) == of_key(SEGMENT)) if form.prefixed else same
    if form.window is not None:
        seen &= of_query(POSITION) - of_key(POSITION) < form.window
    return seen


def _as_row(marks: Array) -> Any:
    return lambda mark: marks[mark : mark + 1, :]


def _as_column(marks: Array) -> Any:
    turned = marks.T
    return lambda mark: turned[:, mark : mark + 1]


def _dot(x: Array, y: Array, dimensions: Any) -> Array:
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision(x.dtype), preferred_element_type=jnp.float32
    )


def _scores(form: Form, first: Array, second: Array, seen: Array) -> tuple[Array, Array | None]:
    """Scores of two blocks of vectors, and their derivative by the uncapped ones; None: 1."""
    scores, slope = _dot(first, second, CONTRACT_LAST) * form.scale, None
    if form.cap is not None:
        share = jnp.tanh(scores / form.cap)
        scores, slope = form.cap * share, 1 - share * share
    return jnp.where(seen, scores, HIDDEN), slope


def _forward_kernel(
    form, width, several, order, number, q, k, v, own, other, out, log_sum, top, total, mixed
):
    row = pl.program_id(0) if several else 0
    block, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def begin():
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(step < number[row * pl.num_programs(2) + block])
    def add():
        seen = _sees(form, _as_column(own[...]), _as_row(other[...]))
        scores, _ = _scores(form, q[...], k[...], seen)
        above = jnp.maximum(top[...], scores.max(-1, keepdims=True))
        weights, shrink = jnp.exp(scores - above), jnp.exp(top[...] - above)
        top[...] = above
        total[...] = shrink * total[...] + weights.sum(-1, keepdims=True)
        mixed[...] = shrink * mixed[...] + _dot(weights.astype(v.dtype), v[...], CONTRACT_INNER)

    @pl.when(step == width - 1)
    def end():
        out[...] = (mixed[...] / total[...]).astype(out.dtype)
        log_sum[...] = (top[...] + jnp.log(total[...])).T


def _query_kernel(
    form, width, several, order, number, q, k, v, own, other, d_out, log_sum, inner, d_q, total
):
    row = pl.program_id(0) if several else 0
    block, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def begin():
        total[...] = jnp.zeros_like(total)

    @pl.when(step < number[row * pl.num_programs(2) + block])
    def add():
        seen = _sees(form, _as_column(own[...]), _as_row(other[...]))
        scores, slope = _scores(form, q[...], k[...], seen)
        weights = jnp.exp(scores - log_sum[...].T)
        d_scores = weights * (_dot(d_out[...], v[...], CONTRACT_LAST) - inner[...].T)
        if slope is not None:
            d_scores *= slope
        total[...] += _dot(d_scores.astype(k.dtype), k[...], CONTRACT_INNER)

    @pl.when(step == width - 1)
    def end():
        d_q[...] = (total[...] * form.scale).astype(d_q.dtype)


def _key_kernel(
    form, width, several, order, number, q, k, v, own, other, d_out, log_sum, inner, d_k, d_v, *sums
):
    """Scores are transposed here: keys by queries."""
    row = pl.program_id(0) if several else 0
    block, head, step = (pl.program_id(axis) for axis in (2, 3, 4))
    keys, values = sums

    @pl.when((step == 0) & (head == 0))
    def begin():
        keys[...] = jnp.zeros_like(keys)
        values[...] = jnp.zeros_like(values)

    @pl.when(step < number[row * pl.num_programs(2) + block])
    def add():
        seen = _sees(form, _as_row(other[...]), _as_column(own[...]))
        scores, slope = _scores(form, k[...], q[...], seen)
        weights = jnp.exp(scores - log_sum[...])
        values[...] += _dot(weights.astype(d_out.dtype), d_out[...], CONTRACT_INNER)
        d_scores = weights * (_dot(v[...], d_out[...], CONTRACT_LAST) - inner[...])
        if slope is not None:
            d_scores *= slope
        keys[...] += _dot(d_scores.astype(q.dtype), q[...], CONTRACT_INNER)

    @pl.when((step == width - 1) & (head == pl.num_programs(3) - 1))
    def end():
        d_k[...] = (keys[...] * form.scale).astype(d_k.dtype)
        d_v[...] = values[...].astype(d_v.dtype)


class _Call(NamedTuple):
    """Sizes of a call, and where its blocks lie; a program is (row, head, block[, head], step)."""

    form: Form
    rows: int
    heads: int
    groups: int
    blocks: int
    width: int
    head_width: int
    several: bool
    """Whether each row has marks of its own."""

    @staticmethod
    def of(form: Form, q: Array, k: Array, marks: Array) -> "_Call":
        rows, heads, length, head_width = q.shape
        blocks = length // form.size
        return _Call(
            form=form,
            rows=rows,
            heads=heads,
            groups=heads // k.shape[1],
            blocks=blocks,
            width=form.width(blocks),
            head_width=head_width,
            several=marks.shape[0] > 1,
        )

    def place(self, *ids: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Row, row of marks, head, own block and the block that it sees in this step.

        Args:
          ids: of the program, then what `_listed` returned.
        """
        row, head, block, *inner, order, _ = ids
        if len(inner) == 2:
            head = head * self.groups + inner[0]
        marked = row if self.several else 0
        other = order[(marked * self.blocks + block) * self.width + inner[-1]]
        return row, marked, head, block, other

    def vectors(self, own: bool, grouped: bool = False) -> pl.BlockSpec:
        """Vectors of the own block or of the one seen; `grouped`: of keys and values."""

        def index(*ids: Any) -> tuple[Any, ...]:
            row, _, head, block, other = self.place(*ids)
            head = jax.lax.div(head, jnp.int32(self.groups)) if grouped else head
            return row, head, block if own else other, 0

        return pl.BlockSpec((None, None, self.form.size, self.head_width), index)

    def numbers(self, own: bool) -> pl.BlockSpec:
        """A number for each query of the own block or of the one seen."""

        def index(*ids: Any) -> tuple[Any, ...]:
            row, _, head, block, other = self.place(*ids)
            return row, head, 0, block if own else other

        return pl.BlockSpec((None, None, 1, self.form.size), index)

    def marks(self, own: bool) -> pl.BlockSpec:
        """Marks of the own block or of the one seen."""

        def index(*ids: Any) -> tuple[Any, ...]:
            _, marked, _, block, other = self.place(*ids)
            return marked, 0, block if own else other

        return pl.BlockSpec((None, SUBLANES, self.form.size), index)

    def run(
        self,
        kernel: Any,
        products: int,
        listed: tuple[Array, Array],
        reads: list[tuple[Array, pl.BlockSpec, bool]],
        out: list[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        scratch: list[int],
    ) -> tuple[Array, ...]:
        """Run a kernel, whose last dimension of programs sums up.

        Args:
          kernel: its body.
          products: number of matrix products per block.
          listed: from `_listed`.
          reads: arrays, their blocks, and whether each step reads another one.
          out: shape, dtype and block of each result.
          scratch: widths of arrays [size, width] that are kept between steps.
        """
        form = self.form
        groups = (self.groups,) if kernel is _key_kernel else ()
        heads = self.heads // math.prod(groups)
        pairs = min(self.blocks * self.width, self.blocks * (self.blocks + 1) // 2)
        pairs *= self.rows * self.heads
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in out]
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in results)
        for x, _, each_step in reads:
            moved += pairs * form.size * x.shape[-1] * x.dtype.itemsize if each_step else x.nbytes
        name = kernel.__name__.strip("_")
        run = pl.pallas_call(
            functools.partial(kernel, form, self.width, self.several),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.rows, heads, self.blocks, *groups, self.width),
                in_specs=[spec for _, spec, _ in reads],
                out_specs=[spec for *_, spec in out],
                scratch_shapes=[pltpu.VMEM((form.size, width), jnp.float32) for width in scratch],
            ),
            out_shape=results,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (1 + len(groups))
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * form.size**2 * self.head_width,
                transcendentals=pairs * form.size**2,
                bytes_accessed=moved,
            ),
            interpret=form.interpret,
            name=f"flash_attention_{name}",
        )
        return tuple(run(*listed, *(x for x, *_ in reads)))


def _forward(
    form: Form, q: Array, k: Array, v: Array, marks: Array, sinks: Array | None
) -> tuple[Array, Array]:
    """Attention, and the log-sum-exp of each query's scores, [rows, heads, 1, length].

    A sink is one more score, of a value of zero: it is in the log-sum-exp and shrinks the mixture.
    The kernels of the backward pass need to know no more of it.
    """
    call = _Call.of(form, q, k, marks)
    own, other = call.vectors(True), call.vectors(False, grouped=True)
    rows, heads, length, width = q.shape
    out, log_sum = call.run(
        _forward_kernel,
        2,
        _listed(form, _visible(form, marks)),
        [
            (q, own, False),
            (k, other, True),
            (v, other, True),
            (marks, call.marks(True), False),
            (marks, call.marks(False), False),
        ],
        [
            (q.shape, q.dtype, own),
            ((rows, heads, 1, length), jnp.float32, call.numbers(True)),
        ],
        [1, 1, width],
    )
    if sinks is None:
        return out, log_sum
    whole = jnp.logaddexp(log_sum, sinks)
    kept = jnp.swapaxes(jnp.exp(log_sum - whole), 2, 3)
    return (out.astype(jnp.float32) * kept).astype(out.dtype), whole


def _attention_primal(
    form: Form, q: Array, k: Array, v: Array, marks: Array, sinks: Array | None
) -> Array:
    return _forward(form, q, k, v, marks, sinks)[0]


def _attention_fwd(
    form: Form, q: Array, k: Array, v: Array, marks: Array, sinks: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    out, log_sum = (checkpoint_name(x, OUTPUT) for x in _forward(form, q, k, v, marks, sinks))
    return out, (q, k, v, marks, sinks, out, log_sum)


def _attention_bwd(
    form: Form, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None, Array | None]:
    q, k, v, marks, sinks, out, log_sum = saved
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    call, seen = _Call.of(form, q, k, marks), _visible(form, marks)
    marked = [(marks, call.marks(True), False), (marks, call.marks(False), False)]
    own, other = call.vectors(True), call.vectors(False, grouped=True)
    numbers = call.numbers(True)
    (d_q,) = call.run(
        _query_kernel,
        3,
        _listed(form, seen),
        [
            (q, own, False),
            (k, other, True),
            (v, other, True),
            *marked,
            (d_out, own, False),
            (log_sum, numbers, False),
            (inner, numbers, False),
        ],
        [(q.shape, q.dtype, own)],
        [call.head_width],
    )
    own, other = call.vectors(True, grouped=True), call.vectors(False)
    numbers = call.numbers(False)
    d_k, d_v = call.run(
        _key_kernel,
        4,
        _listed(form, jnp.swapaxes(seen, 1, 2)),
        [
            (q, other, True),
            (k, own, False),
            (v, own, False),
            *marked,
            (d_out, other, True),
            (log_sum, numbers, False),
            (inner, numbers, False),
        ],
        [(k.shape, k.dtype, own), (v.shape, v.dtype, own)],
        [call.head_width, call.head_width],
    )
    d_sinks = None if sinks is None else -jnp.exp(sinks - log_sum) * inner
    return d_q, d_k, d_v, None, d_sinks


_attention: Any = jax.custom_vjp(_attention_primal, nondiff_argnums=(0,))
_attention.defvjp(_attention_fwd, _attention_bwd)
