"""Batches of single responses with a label each."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.data.batches import ROUNDING, PairBatch, bucket_edges, padded_pairs, padded_positions
from jaxalign.data.order import Iterations, batch_order, ordered_batches
from jaxalign.data.packing import (
    Packer,
    Packing,
    Placement,
    pack,
    packed_sizes,
    padded_shape,
    placed_batches,
)
from jaxalign.data.tokenized import TokenizedResponses, TokenizedRows
from jaxalign.records import AnyArray, record

Mismatched = Literal["none", "batch", "all"]
"""Whose response a prompt also gets: nobody's, that of the next row of its batch, or that of the
next of all responses, whatever the batches."""


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Prompts, each with a response and its label, as tokens."""

    rows: TokenizedRows
    desirable: Bool[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.rows)


@record
class LabelledBatch:
    """Responses with their labels.

    Attributes:
      responses: prompts and responses, one side.
      mismatched: the same prompts with responses of other rows, one side; None: not made.
      desirable: the labels.
      importance: factor on the loss of each response; None: 1.
    """

    responses: PairBatch
    mismatched: PairBatch | None
    desirable: Bool[AnyArray, " rows"]
    importance: Float[AnyArray, " rows"] | None = None

    @property
    def record_index(self) -> Int[AnyArray, " rows"]:
        """Number of each record in its source, from 0."""
        return self.responses.record_index


def labelled_batches(
    data: LabelledRows,
    *,
    max_length: int,
    mismatched: Mismatched = "none",
    buckets: int | Sequence[int] = 4,
    packing: Packing | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
    **order: Any,
) -> Iterations:
    """Batches of labelled responses.

    Args:
      data: rows and labels.
      max_length: most tokens of a prompt with another row's response; longer prompts lose their
        beginning.
      mismatched: whose response a prompt also gets.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the data.
      packing: number of packed rows, of the responses and of the mismatched ones; None: padded.
      process_index: of `ordered_batches`.
      process_count: of `ordered_batches`.
      prefetch: of `ordered_batches`.
      **order: of `batch_order`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `LabelledBatch` with `get_state` and `set_state`.
    """
    share = {"process_index": process_index, "process_count": process_count, "prefetch": prefetch}
    own, reach = TokenizedResponses(rows=data.rows), int(data.rows.length.max())
    others = None if mismatched == "none" else _Others(data.rows, max_length, mismatched)

    def batch(
        members: np.ndarray, at: Placement, shape: tuple[int, int], room: np.ndarray | None
    ) -> LabelledBatch:
        """This process's part of a batch, packed where it has a placement in rows."""

        def one_side(
            rows: TokenizedResponses,
            at: Placement,
            shape: tuple[int, int],
            room: np.ndarray | None,
            reach: int,
        ) -> PairBatch:
            packed = None if room is None else pack(rows, at, room, reach=reach)
            return padded_pairs(rows, at.members, at.weight, *shape, packed=packed)

        other = None
        if others is not None:
            number = {member: place for place, member in enumerate(members.tolist())}
            theirs = np.array([number[member] for member in at.members.tolist()])
            theirs = dataclasses.replace(at, members=theirs)
            their_room = None if room is None else room[2:]
            other = one_side(others.of(members), theirs, others.shape, their_room, others.longest)
        return LabelledBatch(
            responses=one_side(own, at, shape, room, reach),
            mismatched=other,
            desirable=data.desirable[at.members],
        )

    if packing is None:
        length, widest = data.rows.length, padded_shape(own)[1]
        edges = bucket_edges(length, buckets)

        def padded(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> LabelledBatch:
            size = edges[int(np.searchsorted(edges, length[members].max()))]
            at = Placement(members=mine, weight=weight, rows=None, first_row=0)
            return batch(members, at, (size, min(size, widest)), None)

        return ordered_batches(length, padded, **share, **order)
    packer, shape = _packer(data, others, packing, **order), padded_shape(own)
    return placed_batches(
        packer, lambda members, at: batch(members, at, shape, packer.room), **share
    )


def labelled_positions(
    data: LabelledRows,
    packing: Packing | None,
    *,
    max_length: int,
    mismatched: Mismatched = "none",
    **order: Any,
) -> float:
    """Mean number of positions that the network computes for a batch of `labelled_batches`.

    Args:
      data: rows and labels.
      packing: number of packed rows, into which a batch can be shared equally; None: padded.
      max_length: as in `labelled_batches`.
      mismatched: as in `labelled_batches`.
      **order: of `batch_order`.
    """
    others = None if mismatched == "none" else _Others(data.rows, max_length, mismatched)
    if packing is None:
        theirs = 0 if others is None else order["batch_size"] * others.shape[0]
        return theirs + padded_positions(TokenizedResponses(rows=data.rows), **order)
    room = _packer(data, others, packing, **order).room
    assert room is not None
    return packing.rows * float(room[::2].sum())


def _packer(data: LabelledRows, others: "_Others | None", packing: Packing, **order: Any) -> Packer:
    """The packer of `labelled_batches`; its room is that of responses, then of mismatched ones."""
    own = packed_sizes(TokenizedResponses(rows=data.rows))

    def sizes(members: np.ndarray) -> np.ndarray:
        if others is None:
            return own[members]
        return np.concatenate([own[members], packed_sizes(others.of(members))], axis=1)

    return Packer(batch_order(data.rows.length, sizes=own, **order), packing, sizes)


class _Others:
    """Prompts with the responses of other rows.

    Args:
      rows: prompts and responses.
      max_length: most tokens of a prompt with another row's response.
      whose: "batch" or "all".
    """

    def __init__(self, rows: TokenizedRows, max_length: int, whose: Mismatched):
        self._rows, self._whose, self._begin = rows, whose, rows.begin
        response = rows.length - self._begin
        self.longest = min(max_length, int(self._begin.max() + response.max()))
        """Most tokens of a prompt with a response."""
        self.shape = _rounded(self.longest), _rounded(int(response.max()))
        """Tokens of a padded row, and of a response."""

    def of(self, members: np.ndarray) -> TokenizedResponses:
        """A row for each example of a batch: its prompt, and a response of another."""
        after = np.roll(members, -1) if self._whose == "batch" else (members + 1) % len(self._rows)
        rows, begin = self._rows, self._begin
        texts = [
            _cut(rows[own][: begin[own]], rows[other][begin[other] :], self.longest)
            for own, other in zip(members.tolist(), after.tolist(), strict=True)
        ]
        joined = [np.concatenate(text) for text in texts]
        prompt_length = np.array([len(prompt) for prompt, _ in texts], np.int32)
        scored = None
        if rows.scored is not None:
            masks = [np.zeros(len(text), bool) for text in joined]
            for mask, other, size in zip(masks, after.tolist(), prompt_length, strict=True):
                at = rows.scored_in(other) - begin[other] + size
                mask[at[at < len(mask)]] = True
            scored = np.concatenate(masks)
            prompt_length = np.array([(~mask).sum() for mask in masks], np.int32)
        return TokenizedResponses(
            rows=TokenizedRows(
                flat=np.concatenate(joined),
                offsets=np.cumsum([0, *map(len, joined)]),
                prompt_length=prompt_length,
                record_index=rows.record_index[members],
                scored=scored,
            )
        )


def _rounded(length: int) -> int:
    return -(-length // ROUNDING) * ROUNDING


def _cut(prompt: np.ndarray, response: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and a response of at most so many tokens together; the prompt keeps its end."""
    response = response[: length - 1]
    return prompt[max(0, len(prompt) + len(response) - length) :], response
