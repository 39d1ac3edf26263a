"""Causal attention: kernels on TPUs and GPUs, in blocks elsewhere, row by row on a single CPU."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.errors import UserError
from jaxalign.models import devices
from jaxalign.models.differentiation import in_forward_mode, with_reverse_rule
from jaxalign.models.flash import LANES, OUTPUT, flash_attention, whole_rows
from jaxalign.models.layers import softcap, softmax
from jaxalign.models.precision import precision
from jaxalign.models.products import named
from jaxalign.models.sequences import Sequences, attend_apart

IMPLEMENTATIONS = ("auto", "blocked", "flash", "cudnn")


def attention(
    q: Float[Array, "batch length heads head_width"],
    k: Float[Array, "batch length kv_heads head_width"],
    v: Float[Array, "batch length kv_heads head_width"],
    *,
    scale: float,
    segment_ids: Int[Array, "batch length"] | None = None,
    prefix_ids: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
    reach: int | None = None,
    sequences: Sequences | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Float[Array, "batch length heads"] | None = None,
    implementation: str = "auto",
    query_block: int = 512,
) -> Float[Array, "batch length heads head_width"]:
    """Causal attention without an array of scores [length, length] for long sequences.

    Args:
      q: queries; heads is a multiple of kv_heads (grouped queries).
      k: keys.
      v: values.
      scale: factor on query-key products.
      segment_ids: a position sees its own segment alone (padding is one more segment). None
        means one segment; rows padded on the right need none, since causality hides padding.
      prefix_ids: the segment that a position's own segment continues, and that it sees, too.
      positions: used for the window; by default the index in the row.
      reach: no position sees one as many or more places before it, as segments and prefixes are
        (which are together, prefix first); needs `prefix_ids`. None: unknown.
      sequences: the same as segments and prefixes say, for a fused kernel; None: unknown.
      window: a position sees itself and the `window - 1` positions before it; None sees all.
      cap: soft cap on scores (Gemma 2), or None.
      sinks: each query's score of attending to no key, after scale and cap (gpt-oss), or None.
      implementation: one of `IMPLEMENTATIONS`: "auto", "blocked" (any device), "flash" (TPU; whole
        rows on each device) or "cudnn" (GPU, 16 bit, no cap; with sinks, windows in rows of up to
        4096 positions).
      query_block: number of queries in a block of "blocked" and "flash".

    Returns:
      [batch, length, heads, head_width] in the dtype of `q`.

    Raises:
      UserError: there is no such implementation, or the arrays are not sharded as "flash" needs.
    """
    if implementation == "auto":
        plain = segment_ids is None or sequences is not None
        plain = plain and (sinks is None or window is None)
        implementation = _fastest(q, k, plain=plain, cap=cap, sinks=sinks)
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"attention: {implementation!r} is not one of {choices}")
    if in_forward_mode():
        implementation = "blocked"
    if implementation == "flash":
        if not whole_rows(q, k):
            raise UserError(
                "attention: flash needs whole rows and groups of heads on each device; set "
                "blocked, mesh.sequence 1, and mesh.tensor to a divisor of the number of key heads"
            )
        return flash_attention(
            q,
            k,
            v,
            scale=scale,
            segments=segment_ids,
            prefixes=prefix_ids,
            positions=positions,
            reach=reach,
            window=window,
            cap=cap,
            sinks=sinks,
            block=query_block,
        )
    place = jnp.arange(q.shape[1])[None]
    row = _Row(
        place=place,
        segment=jnp.ones_like(place) if segment_ids is None else segment_ids,
        prefix=prefix_ids,
        position=place if prefix_ids is None or positions is None else positions,
    )
    if implementation == "cudnn":
        width, attend = q.shape[-1], functools.partial(_cudnn, scale=scale, window=window)
        masked = _cudnn_masked
        if sinks is not None:
            q, k, v = _widened(q, k, v, sinks / scale)
            attend = functools.partial(_cudnn_sinks, width=width, scale=scale, window=window)
            masked = functools.partial(_cudnn_sinks, width=width)
        if segment_ids is None:
            mixed = attend(q, k, v)
        elif sequences is not None:
            mixed = attend_apart(attend, q, k, v, sequences)
        else:
            mixed = masked(q, k, v, seen=_sees(row, row, window), scale=scale)
        return named(mixed[..., :width], OUTPUT)
    if prefix_ids is None or (reach is not None and reach >= q.shape[1]):
        reach = None
    queries = _Queries(q, sinks)
    mixed = _blocked_attention(queries, k, v, row, scale, window, cap, reach, query_block)
    return named(mixed, OUTPUT)


LONGEST_MASK = 4096
"""Length of rows for which cuDNN reads an array of what each position sees."""
SINK_WIDTH = 8
"""How much wider heads are for cuDNN where a sink is one more key."""


def _fastest(
    q: Array, k: Array, *, plain: bool, cap: float | None, sinks: Array | None = None
) -> str:
    """The implementation for these arrays; `plain`: rows that causality alone describes."""
    if in_forward_mode():
        return "blocked"
    if devices.platform() == "tpu":
        # A kernel is never split by the compiler: the sharding must be known.
        known = devices.device_count() == 1 or devices.head_sharding() is not None
        return "flash" if known and whole_rows(q, k) and q.shape[1] >= LANES else "blocked"
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    width = q.shape[-1] + (0 if sinks is None else SINK_WIDTH)
    fits = half and width % 8 == 0 and width <= 128 and cap is None
    fits = fits and (plain or q.shape[1] <= LONGEST_MASK)
    return "cudnn" if devices.platform() == "gpu" and fits else "blocked"


def _widened(q: Array, k: Array, v: Array, sinks: Array) -> tuple[Array, Array, Array]:
    """Heads with more entries: queries have their sink there, in two parts of 16 bits, others 0."""

    def wider(x: Array) -> Array:
        return jnp.pad(x, ((0, 0),) * 3 + ((0, SINK_WIDTH),))

    width = q.shape[-1]
    coarse = sinks.astype(q.dtype)
    fine = (sinks - coarse.astype(sinks.dtype)).astype(q.dtype)
    q = wider(q).at[..., width].set(coarse).at[..., width + 1].set(fine)
    return q, wider(k), wider(v)


def _cudnn_sinks(
    q: Array,
    k: Array,
    v: Array,
    *,
    width: int,
    scale: float,
    window: int | None = None,
    seen: Array | None = None,
) -> Array:
    """`_cudnn` of `_widened` heads: a key of value 0 in front, which every position sees.

    Its product with a query is the query's sink; all others are as they were.
    """
    length = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) for x in (q, k, v))
    k = k.at[:, 0, :, width : width + 2].set(1)
    if seen is None and window is not None:
        place = jnp.arange(length)
        distance = place[:, None] - place[None]
        seen = ((distance >= 0) & (distance < window))[None]
    if seen is None:
        odd = q.shape[1] % 2
        q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
        return _cudnn(q, k, v, scale=scale, window=None)[:, 1 : length + 1]
    seen = jnp.pad(seen, ((0, 0), (1, 0), (1, 0)), constant_values=True)
    return _cudnn_masked(q, k, v, seen, scale=scale)[:, 1:]


def _cudnn_masked(q: Array, k: Array, v: Array, seen: Array, *, scale: float) -> Array:
    """`_cudnn` of positions that see others as `seen` [rows or 1, queries, keys] says."""
    odd = q.shape[1] % 2  # cuDNN's gradient needs an even length
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    seen = jnp.pad(seen, ((0, 0), (0, odd), (0, odd)), constant_values=True)
    out = _cudnn(q, k, v, scale=scale, window=None, seen=seen[:, None])
    return out[:, : out.shape[1] - odd]


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    window: int | None,
    seen: Array | None = None,
) -> Array:
    """Fused attention of cuDNN, causal, or as `seen` [rows or 1, 1, queries, keys] says."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=seen,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


class _Row(NamedTuple):
    """Index, segments and position of each token, [batch or 1, length]."""

    place: Array
    segment: Array
    prefix: Array | None
    position: Array

    def map(self, change: Callable[[Array], Array]) -> "_Row":
        return jax.tree.map(change, self)


class _Queries(NamedTuple):
    """Queries [..., heads, head_width], and their sinks [..., heads], if there are any."""

    vectors: Array
    sinks: Array | None

    def map(self, change: Callable[[Array], Array]) -> "_Queries":
        return jax.tree.map(change, self)


def _blocked_attention(q, k, v, row, scale, window, cap, reach, block):
    """Exact attention, one block of queries at a time; windows read only the keys they see."""
    mix = functools.partial(_mix, scale=scale, cap=cap)
    if devices.is_single_cpu():
        # In bfloat16 every operand of these small products would be converted at each use.
        dtype, wide = k.dtype, jnp.promote_types(k.dtype, jnp.float32)
        q, k, v = jax.tree.map(lambda x: x.astype(wide), (q, k, v))
        if reach is None:
            return _row_by_row(mix, q, k, v, row, window, block).astype(dtype)
        form = _Form(scale=scale, cap=cap, window=window, reach=reach)
        packed = functools.partial(_packed_row, form)
        rows = _whole(row, q.vectors)
        return jax.lax.map(lambda inputs: packed(*inputs), (q, k, v, rows)).astype(dtype)
    batch, length, heads, width = q.vectors.shape
    k, v = devices.whole_length(k), devices.whole_length(v)

    def attend(q, k, v, queries, keys):
        seen = _sees(queries, keys, window)
        return jax.vmap(mix)(q, k, v, jnp.broadcast_to(seen, (len(k), *seen.shape[1:])))

    if length <= block:
        return attend(q, k, v, row, row)
    padding = -length % block
    blocks = (length + padding) // block
    strided = devices.splits_length()  # every block spans the row: a part for each device

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        sizes = (block, blocks) if strided else (blocks, block)
        return jnp.moveaxis(x.reshape(x.shape[0], *sizes, *x.shape[2:]), 2 if strided else 1, 0)

    # A windowed block reads its own positions and the window - 1 positions before them.
    if row.prefix is None:
        reach = window
    narrow = reach is not None and not strided
    span = min(length, block + reach - 1) if narrow else length

    @jax.checkpoint
    def one_block(start, q_block, q_row):
        first = jnp.clip(start + block - span, 0, length - span)

        def read(x):
            return jax.lax.dynamic_slice_in_dim(x, first, span, axis=1) if narrow else x

        return attend(q_block, read(k), read(v), q_row, row.map(read))

    def step(_, inputs):
        return None, one_block(*inputs)

    starts = jnp.arange(blocks) * block
    _, out = jax.lax.scan(step, None, (starts, q.map(split), row.map(split)))
    out = jnp.moveaxis(out, 0, 2 if strided else 1)
    return out.reshape(batch, -1, heads, width)[:, :length]


def _row_by_row(mix, q, k, v, row, window, block):
    """Attention on one CPU: row by row, a quarter of a row's queries at a time.

    The arrays then stay in the cache, and a quarter reads no later key.
    """
    length = k.shape[1]
    size = min(block, -(-length // 4))
    reach = length if window is None or row.prefix is not None else window
    seen = _sees(row, row, window)

    @jax.checkpoint
    def one_row(inputs):
        q, k, v, seen = inputs
        parts = []
        for first in range(0, length, size):
            own, keys = slice(first, first + size), slice(max(0, first - reach + 1), first + size)
            queries = q.map(operator.itemgetter(own))
            parts.append(mix(queries, k[keys], v[keys], seen[own, keys]))
        return jnp.concatenate(parts)

    if seen.shape[0] == 1:
        return jax.lax.map(lambda inputs: one_row((*inputs, seen[0])), (q, k, v))
    return jax.lax.map(one_row, (q, k, v, seen))


PACKED_BLOCK = 128
"""Number of queries in a block of a packed row on one CPU."""


class _Form(NamedTuple):
    """The constants of attention over a packed row."""

    scale: float
    cap: float | None
    window: int | None
    reach: int

    def spans(self, length: int) -> list[int]:
        """The numbers of keys that a block may read, ascending; the last is enough for all."""
        largest = min(PACKED_BLOCK + self.reach - 1, length)
        half = PACKED_BLOCK // 2
        sizes = (half * (2 + n % 2) << n // 2 for n in range(1, 64))  # 3, 4, 6, 8, 12, ... halves
        return [*itertools.takewhile(lambda size: size < largest, sizes), largest]

    def mix(self, q: _Queries, k: Array, v: Array, queries: _Row, keys: _Row) -> Array:
        """Attention of one block of queries to the keys that it reads."""
        queries, keys = (row.map(lambda x: x[None]) for row in (queries, keys))
        seen = _sees(queries, keys, self.window)[0]
        return _mix(q, k, v, seen, scale=self.scale, cap=self.cap)


def _whole(row: _Row, q: Array) -> _Row:
    """The places and segments of every row of a batch."""
    return row.map(lambda x: jnp.broadcast_to(x, q.shape[:2]))


class _Blocks(NamedTuple):
    """A packed row in blocks of queries, padded to whole ones, and its keys."""

    q: _Queries
    queries: _Row
    k: Array
    v: Array
    keys: _Row
    start: Array
    """First query of each block."""
    needed: Array
    """Number of keys that each block reads: from the first pair's first token to its own last."""


def _blocks(q: _Queries, k: Array, v: Array, row: _Row) -> _Blocks:
    length = k.shape[0]
    padding = -length % PACKED_BLOCK

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))

    def split(x: Array) -> Array:
        return x.reshape(-1, PACKED_BLOCK, *x.shape[1:])

    q, k, v = q.map(padded), padded(k), padded(v)
    row = row.map(padded)._replace(place=jnp.arange(length + padding))
    assert row.prefix is not None
    before = jnp.pad(row.prefix, (1, 0), constant_values=-1)[:-1]
    first = jax.lax.cummax(jnp.where(row.prefix != before, row.place, 0))
    start = jnp.arange(0, length + padding, PACKED_BLOCK)
    needed = start + PACKED_BLOCK - first[start]
    return _Blocks(q.map(split), row.map(split), k, v, row, start, needed)


def _packed_row_primal(form: _Form, q: _Queries, k: Array, v: Array, row: _Row) -> Array:
    """Attention of one packed row: each block of queries reads the keys of its own pairs.

    Their number is rounded up to one of a few spans.
    """
    blocks = _blocks(q, k, v, row)
    spans = form.spans(blocks.k.shape[0])

    def of_block(inputs: tuple[_Queries, _Row, Array, Array]) -> Array:
        q, queries, start, needed = inputs

        def reading(span: int) -> Array:
            read = _reader(blocks, start, span)
            return form.mix(q, read(blocks.k), read(blocks.v), queries, blocks.keys.map(read))

        branches = [functools.partial(reading, span) for span in spans]
        return jax.lax.switch(_branch(spans, needed), branches)

    out = jax.lax.map(of_block, (blocks.q, blocks.queries, blocks.start, blocks.needed))
    return out.reshape(-1, *out.shape[2:])[: k.shape[0]]


def _reader(blocks: _Blocks, start: Array, span: int) -> Callable[[Array], Array]:
    """Function that slices the keys of a block that begins at a place."""
    first = _first(blocks, start, span)
    return lambda x: jax.lax.dynamic_slice_in_dim(x, first, span)


def _first(blocks: _Blocks, start: Array, span: int) -> Array:
    return jnp.clip(start + PACKED_BLOCK - span, 0, blocks.k.shape[0] - span)


def _branch(spans: Sequence[int], needed: Array) -> Array:
    """The smallest span that holds the keys needed."""
    return jnp.sum(jnp.asarray(spans[:-1], jnp.int32) < needed, dtype=jnp.int32)


def _packed_row_fwd(form, q, k, v, row):
    return _packed_row_primal(form, q, k, v, row), (q, k, v, row)


def _packed_row_bwd(form, saved, d_out):
    q, k, v, row = saved
    blocks = _blocks(q, k, v, row)
    spans = form.spans(blocks.k.shape[0])
    length = k.shape[0]
    padding = -length % PACKED_BLOCK
    d_out = jnp.pad(d_out, ((0, padding), (0, 0), (0, 0))).reshape(blocks.q.vectors.shape)

    def of_block(sums, inputs):
        q, queries, start, needed, d_out = inputs

        def reading(span, sums):
            read = _reader(blocks, start, span)
            keys = blocks.keys.map(read)
            _, pull = jax.vjp(
                lambda q, k, v: form.mix(q, k, v, queries, keys), q, read(blocks.k), read(blocks.v)
            )
            d_q, *added = pull(d_out)
            first = _first(blocks, start, span)
            return [_add_at(x, y, first) for x, y in zip(sums, added, strict=True)], d_q

        branches = [functools.partial(reading, span) for span in spans]
        return jax.lax.switch(_branch(spans, needed), branches, sums)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (blocks.k, blocks.v)]
    inputs = blocks.q, blocks.queries, blocks.start, blocks.needed, d_out
    (d_k, d_v), d_q = jax.lax.scan(of_block, zeros, inputs)
    d_q = d_q.map(lambda x: x.reshape(-1, *x.shape[2:])[:length])
    return d_q, d_k[:length].astype(k.dtype), d_v[:length].astype(v.dtype), None


def _add_at(whole: Array, part: Array, start: Array) -> Array:
    old = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, axis=0)


_packed_row = with_reverse_rule(_packed_row_primal, _packed_row_fwd, _packed_row_bwd, (0,))


def _mix(q, k, v, seen, *, scale, cap):
    """Scores, softmax and mixture for some queries of one row; softmax in float32."""
    q, sinks = q
    number, heads, width = q.shape
    kv_heads, at = k.shape[1], precision(q.dtype)
    groups = heads // kv_heads
    # a head's queries with the groups innermost: positions stay split as they are
    grouped = jnp.moveaxis(q.reshape(number, kv_heads, groups, width), 0, 1)
    grouped = grouped.reshape(kv_heads, number * groups, width)
    keys, values = jnp.moveaxis(k, 0, 1), jnp.moveaxis(v, 0, 1)
    scores = jnp.einsum(
        "hqd,hsd->hqs", grouped, keys, precision=at, preferred_element_type=jnp.float32
    )
    scores = softcap(scores * scale, cap)
    seen = jnp.repeat(seen, groups, axis=0)[None]
    if sinks is not None:
        sinks = jnp.moveaxis(sinks.reshape(number, kv_heads, groups), 0, 1)
        sinks = sinks.reshape(kv_heads, number * groups, 1)
    weights = softmax(jnp.where(seen, scores, -1e30), sinks).astype(q.dtype)
    mixed = jnp.einsum("hqs,hsd->hqd", weights, values, precision=at)
    mixed = jnp.moveaxis(mixed.reshape(kv_heads, number, groups, width), 0, 1)
    return mixed.reshape(number, heads, width)


def _sees(queries: _Row, keys: _Row, window: int | None) -> Bool[Array, "batch queries keys"]:
    """Which keys a query sees: no later ones, those of its segment and of its prefix."""

    def pairs(of_query: Array, of_key: Array) -> tuple[Array, Array]:
        return of_query[:, :, None], of_key[:, None, :]

    query, key = pairs(queries.segment, keys.segment)
    seen = query == key
    if queries.prefix is not None:
        seen |= queries.prefix[:, :, None] == key
    query, key = pairs(queries.place, keys.place)
    seen &= query >= key
    if window is not None:
        query, key = pairs(queries.position, keys.position)
        seen &= query - key < window
    return seen
