"""Batches of fixed shapes from tokenised records, padded to a few lengths."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxalign.data.order import (
    Iterations,
    batch_order,
    ordered_batches,
)
from jaxalign.data.tokenized import TokenizedExamples, TokenizedPairs, TokenizedTexts
from jaxalign.errors import UserError
from jaxalign.records import AnyArray, record
from jaxalign.rows import PackedRows, ResponseRows, SharedPrefixRows

ROUNDING = 8  # lengths are multiples of this, for vector units and tiles


@record
class PairBatch:
    """Preference pairs of one shape; axis `sides` is chosen, rejected, or a single response."""

    tokens: Int[AnyArray, "pairs sides length"]
    """Prompt and response, then zeros."""
    prompt_length: Int[AnyArray, "pairs sides"]
    """Tokens that are not scored: the prompt, and turns of others in the response."""
    response_tokens: Int[AnyArray, "pairs sides response"]
    """The scored tokens: the response with its end-of-sequence token; then zeros."""
    response_length: Int[AnyArray, "pairs sides"]
    record_index: Int[AnyArray, " pairs"]
    """Number of the record in its source, from 0."""
    weight: Float[AnyArray, " pairs"]
    """1; 0 for copies that pad a last, partial batch."""
    joint_tokens: Int[AnyArray, "pairs joint"] | None = None
    """The chosen row, then the rejected one from where they differ, then zeros; None: not made."""
    common_length: Int[AnyArray, " pairs"] | None = None
    """Tokens that both rows begin with; None where there are no joint rows."""
    packed: PackedRows | None = None
    """The same rows packed; None: not made."""
    packed_apart: PackedRows | None = None
    """The same rows packed, each with a prompt of its own; None: not made."""
    scored_positions: Int[AnyArray, "pairs sides response"] | None = None
    """Where in its row each scored token is predicted, then zeros; None: they are the last ones."""

    def rows(self, *, shared_prefix: bool = False) -> ResponseRows:
        """A row per side, chosen first.

        Args:
          shared_prefix: whether the rows carry the batch's packed or joint rows, where it has them.
        """
        joint = None
        if shared_prefix and self.joint_tokens is not None and self.common_length is not None:
            joint = SharedPrefixRows(
                tokens=self.joint_tokens,
                first_length=self.prompt_length[:, 0] + self.response_length[:, 0],
                common_length=self.common_length,
            )
        return ResponseRows(
            tokens=self.tokens.reshape(-1, self.tokens.shape[-1]),
            prompt_length=self.prompt_length.reshape(-1),
            response_tokens=self.response_tokens.reshape(-1, self.response_tokens.shape[-1]),
            response_length=self.response_length.reshape(-1),
            shared_prefix=joint,
            packed=self.packed if shared_prefix else None,
            scored_positions=None
            if self.scored_positions is None
            else self.scored_positions.reshape(-1, self.scored_positions.shape[-1]),
        )

    def apart(self) -> "PairBatch":
        """The same batch with each row by itself: none is joint, and packed rows share no prefix.

        It is padded where there are no such packed rows.
        """
        return dataclasses.replace(
            self,
            joint_tokens=None,
            common_length=None,
            packed=self.packed_apart,
            packed_apart=None,
        )


@record
class TextBatch:
    """Rows of text of one length, each holding one or more documents."""

    tokens: Int[AnyArray, "rows length"]
    segment_ids: Int[AnyArray, "rows length"]
    """1, 2, ... for the documents in a row; 0 is padding."""
    positions: Int[AnyArray, "rows length"]
    """From 0 in every document."""
    target_mask: Int[AnyArray, "rows length"]
    """1 where the token is scored, given those before it in its document."""
    record_index: Int[AnyArray, " rows"]
    """Number of the row's first document in its source, from 0."""
    weight: Float[AnyArray, " rows"]
    """1; 0 for copies that pad a last, partial batch."""


# ------------------------------------------------------------------------------ shapes


def choose_buckets(
    lengths: np.ndarray, *, most: int = 4, gain: float = 0.1, rounding: int = ROUNDING
) -> tuple[int, ...]:
    """Lengths to pad to, so that few programs are compiled and little is padded.

    Args:
      lengths: Int [examples], tokens.
      most: largest number of buckets.
      gain: fraction of padded tokens that one more bucket must save.
      rounding: buckets are multiples of this.

    Returns:
      Ascending; the last is for the longest example. [5, 5, 5, 100] with most=2: (8, 104).
    """
    rounded = -(-np.maximum(lengths, 1) // rounding) * rounding
    edges, counts = np.unique(rounded, return_counts=True)
    while len(edges) > 256:  # neighbours together: the search below is quadratic
        keep = np.arange(len(edges))[(len(edges) - 1) % 2 :: 2]
        counts = np.add.reduceat(counts, np.concatenate([[0], keep[:-1] + 1]))
        edges = edges[keep]
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: least tokens of the examples up to edge j in k + 1 buckets, the last one j
    cost = [edges * total[1:]]
    back: list[np.ndarray] = []
    for _ in range(1, min(most, len(edges))):
        before = np.concatenate([[0], cost[-1]])
        options = before[None, :-1] + edges[:, None] * (total[1:, None] - total[None, :-1])
        options = np.where(
            np.arange(len(edges))[None] <= np.arange(len(edges))[:, None],
            options,
            np.iinfo(np.int64).max,
        )
        back.append(options.argmin(1))
        cost.append(options.min(1))
    number = 0
    while number + 1 < len(cost) and cost[number + 1][-1] < (1 - gain) * cost[number][-1]:
        number += 1
    chosen, at = [int(edges[-1])], len(edges) - 1
    for k in range(number, 0, -1):
        at = int(back[k - 1][at]) - 1
        if at < 0:
            break
        chosen.append(int(edges[at]))
    return tuple(reversed(chosen))


def bucket_edges(lengths: np.ndarray, buckets: int | Sequence[int]) -> tuple[int, ...]:
    """The given lengths to pad to, checked, or at most this many chosen ones."""
    if isinstance(buckets, int):
        return choose_buckets(lengths, most=buckets)
    edges = tuple(sorted(set(buckets)))
    longest = int(lengths.max())
    if not edges or edges[0] < 1 or edges[-1] < longest:
        raise UserError(
            f"buckets: {edges} are too short for the longest example, {longest} tokens; "
            f"let the largest be at least {longest}"
        )
    return edges


# ------------------------------------------------------------------------------ pairs


def pair_batches(
    pairs: TokenizedExamples,
    *,
    buckets: int | Sequence[int] = 4,
    joint_share: float = 0.0,
    **order: Any,
) -> Iterations:
    """Batches of pairs, or of single responses.

    Args:
      pairs: from `tokenize_pairs`, or `TokenizedResponses`.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the data. Each
        length has one size of `response_tokens`: as many shapes as buckets.
      joint_share: make joint rows in those buckets where they take at most this share of the
        tokens of two rows; 0: nowhere.
      **order: of `ordered_batches`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `PairBatch` with `get_state` and `set_state`.
    """
    length, shape_of = pairs.length.max(1), _pair_shapes(pairs, buckets, joint_share)

    def make(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> PairBatch:
        padded, response, joint = shape_of(members)
        batch = padded_pairs(pairs, mine, weight, padded, response)
        if not joint:
            return batch
        return _with_joint_rows(batch, pairs, mine, common_lengths(pairs, mine), joint)

    return ordered_batches(length, make, **order)


def padded_positions(
    pairs: TokenizedExamples,
    *,
    buckets: int | Sequence[int] = 4,
    joint_share: float = 0.0,
    **order: Any,
) -> float:
    """Mean number of positions that the network computes for a batch of an epoch.

    Args:
      pairs: as in `pair_batches`.
      buckets: as in `pair_batches`.
      joint_share: as in `pair_batches`.
      **order: of `batch_order`.
    """
    shape_of = _pair_shapes(pairs, buckets, joint_share)
    order["epochs"] = 1
    batches = batch_order(pairs.length.max(1), **order)
    shapes = [shape_of(batches.batch(at)) for at in range(batches.num_batches or 0)]
    each = [joint or pairs.sides * length for length, _, joint in shapes]
    return float(batches.batch_size * np.mean(each))


def epoch_positions(
    pairs: TokenizedExamples,
    *,
    buckets: int | Sequence[int] = 4,
    joint_share: float = 0.0,
    **order: Any,
) -> tuple[int, int]:
    """Tokens of an epoch, and positions that the network computes for them.

    The others are padding, or copies that fill the last batch.

    Args:
      pairs: as in `pair_batches`.
      buckets: as in `pair_batches`.
      joint_share: as in `pair_batches`; joint rows hold what a pair has in common once.
      **order: of `batch_order`.
    """
    shape_of = _pair_shapes(pairs, buckets, joint_share)
    order["epochs"] = 1
    batches = batch_order(pairs.length.max(1), **order)
    whole, common = pairs.length.sum(1), common_lengths(pairs)
    computed = real = 0
    for at in range(batches.num_batches or 0):
        members = batches.batch(at)
        length, _, joint = shape_of(members)
        computed += batches.batch_size * (joint or pairs.sides * length)
        real += int((whole - common if joint else whole)[members].sum())
    return real, computed


def _pair_shapes(
    pairs: TokenizedExamples, buckets: int | Sequence[int], joint_share: float
) -> Callable[[np.ndarray], tuple[int, int, int]]:
    """Function from a batch's pairs to the tokens of a row, a response and a joint row; 0: none."""
    length, response = pairs.length.max(1), pairs.response_length.max(1)
    edges = bucket_edges(length, buckets)
    response_of = _sizes_within(response, length, edges)
    joint_of = [0] * len(edges)
    if joint_share > 0:
        joint_of = _sizes_within(pairs.length.sum(1) - common_lengths(pairs), length, edges)
        joint_of = [
            size if size <= joint_share * 2 * edge else 0
            for size, edge in zip(joint_of, edges, strict=True)
        ]

    def shape_of(members: np.ndarray) -> tuple[int, int, int]:
        bucket = int(np.searchsorted(edges, length[members].max()))
        return edges[bucket], min(response_of[bucket], edges[bucket]), joint_of[bucket]

    return shape_of


def _sizes_within(needed: np.ndarray, length: np.ndarray, edges: Sequence[int]) -> list[int]:
    """For each bucket, a size that holds what all examples in it or below need."""
    longest = [int(needed[length <= edge].max(initial=1)) for edge in edges]
    return [-(-size // ROUNDING) * ROUNDING for size in longest]


def common_lengths(pairs: TokenizedExamples, members: np.ndarray | None = None) -> np.ndarray:
    """Int64 [pairs]: number of tokens that both rows of these pairs, or of all, begin with.

    0 for single responses.
    """
    if isinstance(pairs, TokenizedPairs) and pairs.common is not None:
        return pairs.common if members is None else pairs.common[members]
    numbers = np.arange(len(pairs)) if members is None else members
    common = np.zeros(len(numbers), np.int64)
    if pairs.sides == 1:
        return common
    for at, most in enumerate(pairs.length.min(1)[numbers]):
        chosen, rejected = (pairs.rows[2 * int(numbers[at]) + side][:most] for side in (0, 1))
        differs = chosen != rejected
        common[at] = differs.argmax() if differs.any() else most
    return common


def _with_joint_rows(
    batch: PairBatch, pairs: TokenizedExamples, members: np.ndarray, common: np.ndarray, size: int
) -> PairBatch:
    """The batch with the rows of each pair also in one."""
    tokens = np.zeros((len(members), size), np.int32)
    for row, member in enumerate(members):
        chosen, rejected = (pairs.rows[2 * int(member) + side] for side in (0, 1))
        ids = np.concatenate([chosen, rejected[common[row] :]])
        tokens[row, : len(ids)] = ids
    return dataclasses.replace(batch, joint_tokens=tokens, common_length=common.astype(np.int32))


def padded_pairs(
    pairs: TokenizedExamples,
    members: np.ndarray,
    weight: np.ndarray,
    length: int,
    response: int,
    *,
    packed: PackedRows | None = None,
    packed_apart: PackedRows | None = None,
) -> PairBatch:
    """The named pairs or single responses, padded to a length, beside the same packed."""
    size, sides = len(members), pairs.sides
    tokens = np.zeros((size, sides, length), np.int32)
    responses, positions = np.zeros((2, size, sides, response), np.int32)
    prompt_length = pairs.prompt_length[members]
    response_length = pairs.length[members] - prompt_length
    for row, member in enumerate(members):
        for side in range(sides):
            number = sides * int(member) + side
            ids, scored = pairs.rows[number], pairs.rows.scored_in(number)
            tokens[row, side, : len(ids)] = ids
            responses[row, side, : len(scored)] = ids[scored]
            positions[row, side, : len(scored)] = scored - 1
    return PairBatch(
        tokens=tokens,
        prompt_length=prompt_length.astype(np.int32),
        response_tokens=responses,
        response_length=response_length.astype(np.int32),
        record_index=pairs.record_index[members].astype(np.int32),
        weight=weight,
        packed=packed,
        packed_apart=packed_apart,
        scored_positions=None if pairs.rows.scored is None else positions,
    )


# ------------------------------------------------------------------------------ text


def text_batches(
    data: TokenizedTexts,
    *,
    length: int,
    seed: int = 0,
    shuffle: bool = True,
    **order: Any,
) -> Iterations:
    """Batches of rows of packed documents.

    The documents form one stream that is cut into rows of `length`, each row beginning with the
    last token of the row before, so that every token but a document's first is scored exactly once.
    What lies together in a row stays together in all epochs; the rows' order changes.

    Args:
      data: from `tokenize_texts`.
      length: tokens of a row.
      seed: of the stream and the order.
      shuffle: documents and rows in random order; off: as given.
      **order: the others of `ordered_batches`: batch_size, epochs and so on.

    Returns:
      An iterator of `TextBatch` with `get_state` and `set_state`.
    """
    rows = _stream(data, length, seed if shuffle else None)

    def make(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> TextBatch:
        del members
        return _text_batch(rows, mine, weight, length)

    how = {"seed": seed, "shuffle": shuffle, "window": 1}
    return ordered_batches(rows.lengths, make, **how, **order)


def packed_rows(data: TokenizedTexts, *, length: int, seed: int = 0) -> int:
    """Rows of an epoch of `text_batches`; the arguments are those."""
    return len(_stream(data, length, seed).lengths)


def _stream(data: TokenizedTexts, length: int, seed: int | None) -> "_Stream":
    """Documents cut into rows; None: as given."""
    return _Stream(data, length, None if seed is None else np.random.default_rng([seed, 2]))


def _text_batch(rows: "_Stream", members: np.ndarray, weight: np.ndarray, length: int) -> TextBatch:
    """The named rows, padded."""
    fields = np.zeros((4, len(members), length), np.int32)
    first = np.zeros(len(members), np.int32)
    for at, member in enumerate(members):
        first[at], values = rows.row(int(member))
        fields[:, at, : values.shape[1]] = values
    tokens, segment_ids, positions, target_mask = fields
    return TextBatch(
        tokens=tokens,
        segment_ids=segment_ids,
        positions=positions,
        target_mask=target_mask,
        record_index=first,
        weight=weight,
    )


class _Stream:
    """Documents one after the other, cut into rows that share one token with their neighbour."""

    def __init__(self, data: TokenizedTexts, length: int, rng: np.random.Generator | None):
        if length < 2:
            raise UserError(f"length: {length} leaves nothing to predict; use 2 or more")
        self._data, self._length = data, length
        self._order = np.arange(len(data)) if rng is None else rng.permutation(len(data))
        sizes = np.diff(data.offsets)[self._order]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        total = int(self._offsets[-1])
        if total < 2:
            raise UserError("the text is a single token; there is nothing to predict")
        starts = np.arange(0, total - 1, length - 1)
        self.lengths = np.minimum(total - starts, length)

    def row(self, number: int) -> tuple[int, np.ndarray]:
        """The first document's number; tokens, segment ids, positions and target mask."""
        start = number * (self._length - 1)
        stop = start + int(self.lengths[number])
        place = np.arange(start, stop)
        document = np.searchsorted(self._offsets, place, side="right") - 1
        begin = np.maximum(self._offsets[document], start)
        positions = place - begin
        first = self._data.offsets[self._order[document]] - self._offsets[document]
        tokens = self._data.flat[first + place]
        values = np.stack([tokens, document - document[0] + 1, positions, positions > 0])
        return int(self._order[document[0]]), values
