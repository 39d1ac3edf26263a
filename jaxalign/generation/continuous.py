"""Continuous batching: a row that has ended makes room for the next prompt.

Prompts are read one after the other. A long one is read in pieces, so that memory for activations
and attention does not grow with it. What a prompt has in common with the one before, such as a
system prompt or examples, is read once: the cache is rewound to there, and the rest is read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxalign.generation import prompt_lookup
from jaxalign.generation.rows import (
    Method,
    Prefilled,
    Rows,
    Source,
    begin,
    prefill,
    prefill_rest,
    run,
)
from jaxalign.models import cached_decoder

PIECE, SHORTEST_PIECE = 256, 32
"""Most tokens of a prompt that are read at once, and the size of the shortest piece; the sizes
between them are powers of two."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response."""

    prompt: int
    """Index of its prompt."""
    sample: int
    """Its index among the responses to the prompt."""
    tokens: Int[np.ndarray, " length"]
    finished: bool
    """Whether it ended with an end token or stop string; if not, it was truncated."""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled programs of continuous batching; each has few shapes."""

    read: Callable[..., Prefilled]
    """(source, prompt, length, slots=) -> what the policies keep of one prompt."""
    read_rest: Callable[..., Prefilled]
    """(source, prefilled, kept, piece, number, present) -> `Prefilled`, as in `prefill_rest`."""
    put: Callable[..., Rows]
    """(source, rows or None, prefilled, number, row, size=) -> rows with a new one among them."""
    run: Callable[..., Rows]
    """(source, rows, ended) -> rows, of which so many have ended."""
    run_drafted: Callable[..., Rows]
    """(source, row, prompt, length) -> the row when it has ended, as in `prompt_lookup`."""
    draft: int
    """Number of tokens in a draft for a single row; 0: there are no drafts."""


def compile_programs(method: Method, *, draft: int = 0) -> Programs:
    """The programs of one method, for decoders on one device.

    Args:
      method: settings.
      draft: number of tokens in a draft where one row is decoded at a time; 0: no drafts.
    """

    def put(
        source: Source,
        rows: Rows | None,
        read: Prefilled,
        number: Int[Array, ""],
        row: Int[Array, ""],
        *,
        size: int,
    ) -> Rows:
        one = begin(source, method, read, number[None])
        if size == 1:
            return one
        return _with_row(_ended_rows(one, size) if rows is None else rows, one, row)

    def drafted(source: Source, rows: Rows, prompt: Array, length: Array) -> Rows:
        return prompt_lookup.run(source, method, rows, prompt, length, tokens=draft)

    return Programs(
        read=jax.jit(functools.partial(_read, method=method), static_argnames="slots"),
        read_rest=jax.jit(functools.partial(_read_rest, method=method)),
        put=jax.jit(put, static_argnames="size", donate_argnums=1),
        run=jax.jit(lambda source, rows, ended: run(source, method, rows, ended), donate_argnums=1),
        run_drafted=jax.jit(drafted, donate_argnums=1),
        draft=draft,
    )


def sample_continuously(
    programs: Programs,
    source: Source,
    method: Method,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[Sequence[int]],
    *,
    rows: int,
    padded: Callable[[int], int],
) -> Iterator[Response]:
    """Responses in the order in which they end; their tokens do not depend on the other rows.

    As in `generate`, a response is determined by the key, its number and its prompt, whatever the
    schedule (sums over a cache are rounded in another order).

    Args:
      programs: of the method.
      source: arrays.
      method: settings of a decoder.
      prompts: tokens of each, at least 1.
      numbers: for each prompt, the number of each of its samples, as in `Rows`.
      rows: how many are decoded at the same time.
      padded: length of a prompt -> length to which it is padded, one of a few.
    """
    slots = max(padded(len(prompt)) for prompt in prompts) + method.sampling.max_tokens
    drafted = rows == 1 and programs.draft > 0
    slots += programs.draft if drafted else 0
    reader = _Reader(programs, source, method, padded=padded, slots=slots)
    waiting = [(at, one) for at, own in enumerate(numbers) for one in range(len(own))][::-1]
    owners: dict[int, tuple[int, int]] = {}
    read_prompt, given, read, state = -1, None, None, None
    while waiting or owners:
        for row in range(rows):
            if row in owners or not waiting:
                continue
            at, one = owners[row] = waiting.pop()
            if at != read_prompt:  # samples of one prompt follow each other
                read_prompt, given = at, _padded(prompts[at], padded(len(prompts[at])))
                read = reader.read(prompts[at])
            number = np.int32(numbers[at][one])
            state = programs.put(source, state, read, number, np.int32(row), size=rows)
        if drafted and given is not None:
            state = programs.run_drafted(source, state, *given)
        else:
            ended = rows - len(owners) + 1 if waiting else rows
            state = programs.run(source, state, np.int32(ended))
        out = jax.device_get(state.samples)
        whole = out.finished | (out.length >= method.sampling.max_tokens)
        for row in [row for row in sorted(owners) if whole[row]]:
            at, one = owners.pop(row)
            tokens, finished = out.tokens[row, : out.length[row]], bool(out.finished[row])
            yield Response(prompt=at, sample=one, tokens=tokens, finished=finished)


class _Reader:
    """Reads one prompt after the other, and what two of them begin with only once.

    Args:
      programs: of the method.
      source: arrays.
      method: settings of a decoder.
      padded: length of a prompt -> length to which it is padded.
      slots: of the caches.
    """

    def __init__(
        self,
        programs: Programs,
        source: Source,
        method: Method,
        *,
        padded: Callable[[int], int],
        slots: int,
    ):
        self._programs, self._source, self._method = programs, source, method
        self._padded, self._slots = padded, slots
        self._before: tuple[Sequence[int], Prefilled] | None = None

    def read(self, prompt: Sequence[int]) -> Prefilled:
        """What the policies keep of a prompt."""
        kept, read = 0, None
        if self._before is not None:
            before, read = self._before
            kept = _in_common(before, prompt)
        if read is None or not self._pays(len(prompt), kept):
            kept = min(len(prompt), PIECE)
            first = _padded(prompt[:kept], self._padded(kept))
            read = self._programs.read(self._source, *first, slots=self._slots)
        present = self._present(prompt)
        while kept < len(prompt):
            size = _size(len(prompt) - kept)
            kept = min(kept, self._slots - size)  # some may be read again, so that all fit
            own = prompt[kept : kept + size]
            piece = np.zeros((1, size), np.int32)
            piece[0, : len(own)] = own
            given = np.int32(kept), piece, np.int32(len(own)), present
            read = self._programs.read_rest(self._source, read, *given)
            kept += len(own)
        self._before = prompt, read
        return read

    def _pays(self, length: int, kept: int) -> bool:
        """Whether reading the rest after so many tokens is less work than reading all."""
        if length > PIECE:  # the programs for pieces are compiled in any case
            return _computed(length - kept) < PIECE + _computed(length - PIECE)
        return _computed(length - kept) <= self._padded(length) // 2

    def _present(self, prompt: Sequence[int]) -> Bool[np.ndarray, "one vocabulary"] | None:
        """The tokens of a prompt, where there is a penalty on them."""
        if self._method.sampling.repetition_penalty == 1:
            return None
        present = np.zeros((1, self._method.config.vocab_size), bool)
        present[0, list(prompt)] = True
        return present


def _in_common(before: Sequence[int], prompt: Sequence[int]) -> int:
    """Number of tokens with which both begin, without the prompt's last one."""
    both = zip(before, prompt[:-1], strict=False)
    return next((at for at, (x, y) in enumerate(both) if x != y), min(len(before), len(prompt) - 1))


def _size(rest: int) -> int:
    """Number of tokens in the next piece, with its padding."""
    size = SHORTEST_PIECE
    while size < min(rest, PIECE):
        size *= 2
    return size


def _computed(rest: int) -> int:
    """Number of tokens in all pieces, with their padding."""
    whole, last = divmod(rest, PIECE)
    return whole * PIECE + (_size(last) if last else 0)


def _padded(prompt: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt as a row padded on the left, and its length."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, size - len(prompt) :] = prompt
    return tokens, np.array([len(prompt)], np.int32)


def _read(source: Source, prompt: Any, length: Any, *, method: Method, slots: int) -> Prefilled:
    return prefill(source, method, prompt, length, slots=slots)


def _read_rest(source: Source, read: Prefilled, *given: Any, method: Method) -> Prefilled:
    return prefill_rest(source, method, read, *given)


def _ended_rows(one: Rows, size: int) -> Rows:
    """Rows without a prompt, of the shapes of another one."""
    empty = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]) if x.ndim else (), x.dtype), one)
    ended: Bool[Array, " rows"] = jnp.ones(size, bool)
    samples = dataclasses.replace(empty.samples, finished=ended)
    return dataclasses.replace(empty, samples=samples)


def _with_row(rows: Rows, one: Rows, row: Int[Array, ""]) -> Rows:
    """The rows with another one in place of one of them."""

    def put(x: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=0)

    caches = [
        cached_decoder.put_row(cache, own, row)
        for cache, own in zip(rows.caches, one.caches, strict=True)
    ]
    bare = [dataclasses.replace(x, caches=[]) for x in (rows, one)]
    return dataclasses.replace(jax.tree.map(put, *bare), caches=caches)
