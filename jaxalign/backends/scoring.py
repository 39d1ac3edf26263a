"""Log-probs of continuations after their contexts; what continuations share is computed once."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.models import decoder, encoder_decoder
from jaxalign.models.compute import Compute
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.decoder import Layout

Tokens = Sequence[int]

SHORTEST = 32
"""Length of the shortest compiled rows; the others are this times powers of two."""
SHARED = 256
"""A row of several continuations has at most this many tokens, or twice those of its context."""
BLOCK = 128
"""Number of positions whose logits are computed at a time."""


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """A continuation under the model."""

    log_prob: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the most likely one; of equally likely tokens, that with the
    smallest id."""


@dataclass(kw_only=True)
class _Row:
    """A context and some of its continuations, one after the other."""

    tokens: list[int]
    segments: list[int]
    """1 in the context, 2, 3, ... in the continuations."""
    positions: list[int]
    responses: list[int] = field(default_factory=list)
    """Of an encoder-decoder: what the decoder reads and predicts."""
    predicted_at: list[int] = field(default_factory=list)
    """Where the states lie that predict the scored tokens."""
    targets: list[int] = field(default_factory=list)
    """The scored tokens, continuation by continuation."""
    members: list[tuple[int, int]] = field(default_factory=list)
    """Number of each continuation, and of its tokens."""


def row_length(tokens: int, limit: int | None) -> int:
    """Length of the compiled rows for so many tokens: 32 times a power of two, or the limit."""
    size = SHORTEST
    while size < tokens:
        size *= 2
    return size if limit is None else min(size, limit)


def score_continuations(
    params: Mapping[str, Any],
    config: ModelConfig,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    dtype: Any = None,
) -> Iterator[tuple[int, ContinuationScore]]:
    """Log-prob of each continuation, and whether greedy decoding writes it.

    In a row of a decoder, several continuations follow their common context. They see the context
    and themselves, at the positions that they would have alone; the last token of a continuation is
    not read. An encoder-decoder has a row for each continuation.

    Args:
      params: nested dict of arrays.
      config: of the model.
      pairs: tokens of context and continuation. A context has at least one token; together they
        have at most one token more than the context of a decoder.
      batch_size: number of rows in a batch.
      dtype: of the computation; None: the parameters' own.

    Yields:
      The number of a pair, and its score; those of the shortest rows first.
    """
    limit = getattr(config, "context_length", None) if _is_decoder(config) else None
    rows = (
        _joined(pairs, limit)
        if _is_decoder(config)
        else list(map(_alone, range(len(pairs)), pairs))
    )
    rows.sort(key=lambda row: len(row.tokens) + len(row.responses))
    for begin in range(0, len(rows), batch_size):
        mine = rows[begin : begin + batch_size]
        log_probs, hits = _scored(params, config, mine, batch_size, limit, dtype)
        at = 0
        for number, length in (member for row in mine for member in row.members):
            own = slice(at, at + length)
            score = ContinuationScore(
                log_prob=float(log_probs[own].sum()), greedy=bool(hits[own].all())
            )
            yield number, score
            at += length


def _is_decoder(config: ModelConfig) -> bool:
    return isinstance(config, DecoderConfig)


def _joined(pairs: Sequence[tuple[Tokens, Tokens]], limit: int | None) -> list[_Row]:
    """Rows of a decoder; continuations of the same context are in one row, if there is room."""
    rows: list[_Row] = []
    newest: dict[tuple[int, ...], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        key, length = tuple(context), len(context)
        most = max(SHARED, 2 * length)
        most = most if limit is None else min(most, limit)
        row = newest.get(key)
        if row is None or len(row.tokens) + len(continuation) - 1 > most:
            places = list(range(length))
            row = _Row(tokens=list(context), segments=[1] * length, positions=places)
            newest[key] = row
            rows.append(row)
        read = list(continuation[:-1])
        first = len(row.tokens)
        row.predicted_at += [length - 1, *range(first, first + len(read))][: len(continuation)]
        row.targets += continuation
        row.tokens += read
        row.segments += [len(row.members) + 2] * len(read)
        row.positions += range(length, length + len(read))
        row.members.append((number, len(continuation)))
    return rows


def _alone(number: int, pair: tuple[Tokens, Tokens]) -> _Row:
    """The row of an encoder-decoder."""
    context, continuation = map(list, pair)
    return _Row(
        tokens=context,
        segments=[],
        positions=[],
        responses=continuation,
        predicted_at=list(range(len(continuation))),
        targets=continuation,
        members=[(number, len(continuation))],
    )


def _scored(
    params: Mapping[str, Any],
    config: ModelConfig,
    rows: Sequence[_Row],
    batch_size: int,
    limit: int | None,
    dtype: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the scored tokens of a batch, float64, and which are the most likely ones."""
    size = row_length(max(len(row.tokens) for row in rows), limit)
    tokens = _padded([row.tokens for row in rows], batch_size, size)
    if _is_decoder(config):
        stride = size
        separate = all(row.segments[-1] <= 2 for row in rows)  # causality says all
        segments = positions = None
        if not separate:
            segments = _padded([row.segments for row in rows], batch_size, size)
            positions = _padded([row.positions for row in rows], batch_size, size)
        program, inputs = _of_decoder, (tokens, segments, positions)
    else:
        stride = row_length(max(len(row.responses) for row in rows), None)
        responses = _padded([row.responses for row in rows], batch_size, stride)
        lengths = [len(row.tokens) for row in rows]
        lengths = np.array(lengths + [1] * (batch_size - len(rows)), np.int32)
        program, inputs = _of_encoder_decoder, (tokens, lengths, responses)
    where = [number * stride + at for number, row in enumerate(rows) for at in row.predicted_at]
    targets = [token for row in rows for token in row.targets]
    blocks = 1
    while blocks * BLOCK < len(targets):
        blocks *= 2
    at_states, at_targets = (np.zeros((blocks, BLOCK), np.int32) for _ in range(2))
    at_states.flat[: len(where)] = where
    at_targets.flat[: len(targets)] = targets
    log_probs, hits = program(params, *inputs, at_states, at_targets, config=config, dtype=dtype)
    log_probs = np.asarray(log_probs, np.float64).reshape(-1)[: len(targets)]
    return log_probs, np.asarray(hits).reshape(-1)[: len(targets)]


def _padded(rows: Sequence[Sequence[int]], number: int, size: int) -> np.ndarray:
    """Rows padded with zeros on the right, and so many rows in all."""
    out = np.zeros((number, size), np.int32)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _of_decoder(
    params: Mapping[str, Any],
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"] | None,
    positions: Int[Array, "rows length"] | None,
    at_states: Int[Array, "blocks block"],
    targets: Int[Array, "blocks block"],
    *,
    config: DecoderConfig,
    dtype: Any,
) -> tuple[Array, Array]:
    layout = None
    if segments is not None:
        prefix = (segments > 0).astype(jnp.int32)
        layout = Layout(segment_ids=segments, prefix_ids=prefix, positions=positions)
    compute = Compute(dtype=dtype)
    states = decoder.hidden_states(params, config, tokens, layout, compute=compute)
    return _at_targets(params, config, states, at_states, targets)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _of_encoder_decoder(
    params: Mapping[str, Any],
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    responses: Int[Array, "rows response"],
    at_states: Int[Array, "blocks block"],
    targets: Int[Array, "blocks block"],
    *,
    config: Any,
    dtype: Any,
) -> tuple[Array, Array]:
    compute = Compute(dtype=dtype)
    states = encoder_decoder.response_states(
        params, config, tokens, lengths, responses, compute=compute
    )
    return _at_targets(params, config, states, at_states, targets)


def _at_targets(
    params: Mapping[str, Any],
    config: ModelConfig,
    states: Float[Array, "rows length width"],
    at_states: Int[Array, "blocks block"],
    targets: Int[Array, "blocks block"],
) -> tuple[Array, Array]:
    """Log-prob of each target, and whether it is the most likely token; block by block."""
    kernel, bias = decoder.unembedding(params, config)
    kernel = kernel.astype(states.dtype)

    def of_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        states, targets = block
        logits = decoder.unembed(states, config, kernel, bias)
        at = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        hits = jnp.argmax(logits, axis=1).astype(targets.dtype) == targets
        return at - jax.nn.logsumexp(logits, axis=1), hits

    chosen = states.reshape(-1, states.shape[-1])[at_states]
    return jax.lax.map(of_block, (chosen, targets))
