"""Batches packed in long rows of one length, so that almost nothing is padding."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxalign.data.balancing import TOLERANCE, balanced_groups
from jaxalign.data.batches import PairBatch, common_lengths, padded_pairs
from jaxalign.data.order import (
    BatchOrder,
    Iterations,
    batch_order,
    check_share,
    filled_batch,
    iterate,
    share_of,
)
from jaxalign.data.tokenized import TokenizedExamples, TokenizedResponses
from jaxalign.rows import PackedRows

SLACK = 1.25 * TOLERANCE
"""Fraction by which rows are longer than those of the first batches: later ones may need it."""
FIRST = 64
"""Least number of batches from which the length of the rows is chosen."""
STEP = 1 / 128
"""Rounding of lengths, as a fraction of them."""
APART_SLACK = 0.03
"""`SLACK` of rows without shared prefixes, whose sizes are not balanced."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How many packed rows make up a batch: one for each micro-batch of each shard."""

    shards: int = 1
    """Number of shards of a batch on the devices, over data and fsdp."""
    micro_batches: int = 1
    """Number of micro-batches."""
    apart: bool = False
    """Whether batches of pairs also have rows in which every response has a prompt of its own."""

    @property
    def rows(self) -> int:
        """Packed rows of a batch."""
        return self.shards * self.micro_batches


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A process's part of a batch, and which of its examples share a packed row."""

    members: Int[np.ndarray, " examples"]
    """The examples; copies that fill a batch are copies of a real one in their row."""
    weight: np.ndarray
    """1; 0 for copies."""
    rows: Int[np.ndarray, "rows members"] | None
    """Places in `members`, row by row; None: the batch does not fit packed rows."""
    first_row: int
    """Number of the first of these rows in the whole batch."""
    fits_apart: bool = False
    """Whether the batch fits rows without shared prefixes."""

    def of_sides(self, sides: int) -> "Placement":
        """The same with each side as an example of its own, one after the other."""

        def each(x: np.ndarray) -> np.ndarray:
            return (sides * x[..., None] + np.arange(sides)).reshape(*x.shape[:-1], -1)

        return dataclasses.replace(
            self,
            members=each(self.members),
            weight=np.repeat(self.weight, sides),
            rows=None if self.rows is None else each(self.rows),
        )


class Packer:
    """Where the examples of each batch of an order go: into packed rows of the same room.

    Args:
      order: of the examples.
      packing: number of rows.
      sizes: examples of a batch -> Int [examples, measures]: what they take of a row's room.
      apart: Int [examples]: tokens of each example without a shared prefix, if there are to be such
        rows; they are not balanced, so that they do not change which examples share a row.
    """

    def __init__(
        self,
        order: BatchOrder,
        packing: Packing,
        sizes: Callable[[np.ndarray], np.ndarray],
        apart: Int[np.ndarray, " examples"] | None = None,
    ):
        self.order, self.packing, self._sizes, self._apart = order, packing, sizes, apart
        room = self._room()
        self.room = None if room is None else room[:-1]
        """Int [measures]: of a row; None: the examples of a batch cannot be shared equally by the
        rows."""
        self.room_apart = None if room is None or apart is None else int(room[-1])
        """Tokens of a row without shared prefixes; None: there are no such rows."""

    def _room(self) -> Int[np.ndarray, " all_measures"] | None:
        order = self.order
        if order.batch_size % self.packing.rows:
            return None
        number = max(FIRST, -(-order.examples // order.batch_size) + 1)
        if order.num_batches is not None:
            number = min(number, order.num_batches)
        most = np.max([self._rows(order.batch(at))[2] for at in range(number)], axis=0)
        slack = np.array([*[SLACK] * (len(most) - 1), APART_SLACK])
        more = most if order.num_batches == number else (1 + slack) * most
        return np.array([_rounded(float(size)) for size in more])

    def _rows(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch in the order of its rows, its weights, and the sizes of the fullest row.

        The last size is without shared prefixes.
        """
        packing = self.packing
        filled, weight = filled_batch(members, self.order.batch_size)
        apart = np.zeros(len(members), int) if self._apart is None else self._apart[members]
        sizes = np.concatenate([self._sizes(members), apart[:, None]], axis=1)
        sizes = np.pad(sizes, ((0, len(filled) - len(members)), (0, 0)))
        groups = balanced_groups(sizes[:, :-1], packing.rows, np.random.default_rng(0))
        most = sizes[groups].sum(1).max(0)
        # example p of a batch is in micro-batch p % micro_batches (`split_micro_batches`)
        groups = groups.reshape(packing.shards, packing.micro_batches, -1)
        places = groups.swapaxes(1, 2).ravel()
        return filled[places], weight[places], most

    def place(
        self, members: np.ndarray, process_index: int = 0, process_count: int = 1
    ) -> Placement:
        """A process's part of a batch.

        Args:
          members: the examples of the whole batch.
          process_index: of `ordered_batches`.
          process_count: of `ordered_batches`; divides the shards.
        """
        packing, fits, fits_apart = self.packing, False, False
        filled, weight = filled_batch(members, self.order.batch_size)
        if self.room is not None:
            filled, weight, most = self._rows(members)
            fits = bool((most[:-1] <= self.room).all())
            fits_apart = self.room_apart is not None and bool(most[-1] <= self.room_apart)
        mine, weight = (share_of(x, process_index, process_count) for x in (filled, weight))
        if not fits:
            return Placement(members=mine, weight=weight, rows=None, first_row=0)
        rows = packing.rows // process_count
        grid = np.arange(len(mine)).reshape(-1, len(mine) // rows, packing.micro_batches)
        grid = grid.swapaxes(1, 2).reshape(rows, -1)
        return Placement(
            members=_copies_beside(mine, weight, grid),
            weight=weight,
            rows=grid,
            first_row=process_index * rows,
            fits_apart=fits_apart,
        )


def pack(
    examples: TokenizedExamples,
    placement: Placement,
    room: Int[np.ndarray, " measures"],
    *,
    reach: int,
) -> PackedRows | None:
    """The packed rows of a placement; None: it has none.

    Args:
      examples: pairs or single responses.
      placement: of their numbers.
      room: tokens of a row, and scored tokens.
      reach: tokens of the longest example.
    """
    members, weight, grid = placement.members, placement.weight, placement.rows
    if grid is None:
        return None
    rows, sides, common_of = len(grid), examples.sides, common_lengths(examples, members)
    tokens, positions, segment_ids = np.zeros((3, rows, room[0]), np.int32)
    scored_positions, scored_tokens = np.zeros((2, rows, room[1]), np.int32)
    row_of = np.zeros(len(members), np.int32)
    scored_start, last = np.zeros((2, len(members), sides), np.int32)
    for row, group in enumerate(grid):
        at, scored, kept = 0, 0, {}
        real_first = group[np.argsort(-weight[group], kind="stable")]
        for number, place in enumerate(real_first):
            row_of[place] = placement.first_row + row
            member = int(members[place])
            if weight[place] == 0 and member in kept:  # the same tokens, not once more
                scored_start[place], last[place] = kept[member]
                continue
            wholes = [examples.rows[sides * member + side] for side in range(sides)]
            common, first = int(common_of[place]), len(wholes[0])
            ids = np.concatenate([wholes[0], *(whole[common:] for whole in wholes[1:])])
            index = np.arange(len(ids))
            own = slice(at, at + len(ids))
            tokens[row, own] = ids
            positions[row, own] = np.where(index < first, index, index - first + common)
            part = np.where(index >= first, 3, np.where(index < common, 1, 2))
            segment_ids[row, own] = 3 * number + part
            for side, whole in enumerate(wholes):
                targets = examples.rows.scored_in(sides * member + side)
                where = np.append(targets - 1, len(whole) - 1)
                if side == 1:
                    where = np.where(where < common, where, where + first - common)
                scored_start[place, side], last[place, side] = scored, at + where[-1]
                own = slice(scored, scored + len(where) - 1)
                scored_positions[row, own] = at + where[:-1]
                scored_tokens[row, own] = whole[targets]
                scored += len(where) - 1
            kept[member] = scored_start[place], last[place]
            at += len(ids)
    return PackedRows(
        tokens=tokens,
        positions=positions,
        segment_ids=segment_ids,
        scored_positions=scored_positions,
        scored_tokens=scored_tokens,
        row_number=np.arange(placement.first_row, placement.first_row + rows, dtype=np.int32),
        row=row_of,
        scored_start=scored_start,
        last=last,
        reach=reach,
    )


def pack_apart(
    examples: TokenizedExamples,
    placement: Placement,
    room: Int[np.ndarray, " measures"],
    *,
    reach: int,
) -> PackedRows | None:
    """`pack` without shared prefixes: every side has its prompt; None: the batch does not fit."""
    if not placement.fits_apart:
        return None
    sides, single = examples.sides, TokenizedResponses(rows=examples.rows)
    placement = placement.of_sides(sides)
    packed = pack(single, placement, room, reach=reach)
    return packed and dataclasses.replace(
        packed,
        row=packed.row[::sides],
        scored_start=packed.scored_start.reshape(-1, sides),
        last=packed.last.reshape(-1, sides),
        apart=True,
    )


def _copies_beside(members: np.ndarray, weight: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The batch with the copies in each row copies of a real example in it, where it has one."""
    members = members.copy()
    for group in grid:
        real = group[weight[group] > 0]
        copies = group[weight[group] == 0]
        members[copies] = members[real[0]] if len(real) else members[copies[:1]]
    return members


def _rounded(size: float) -> int:
    """A size rounded up to a multiple of a power of two, at most `STEP` of it."""
    size = max(1, int(np.ceil(size)))
    step = 1 << max(0, int(np.log2(size * STEP)))
    return -(-size // step) * step


def padded_shape(examples: TokenizedExamples) -> tuple[int, int]:
    """Tokens of a row, and of a response, that hold every example."""
    longest = int(examples.length.max()), int(examples.response_length.max())
    length, response = (-(-size // 8) * 8 for size in longest)
    return length, min(response, length)


def packed_sizes(examples: TokenizedExamples) -> Int[np.ndarray, "examples 2"]:
    """Tokens of each example with a pair's common prefix once, and scored tokens."""
    return np.stack(
        [examples.length.sum(1) - common_lengths(examples), examples.response_length.sum(1)],
        axis=1,
    )


def packer_of(examples: TokenizedExamples, packing: Packing, **options: Any) -> Packer:
    """The packer of `packed_batches`, whose options these are."""
    sizes = packed_sizes(examples)
    order = batch_order(examples.length.max(1), sizes=sizes, **options)
    apart = examples.length.sum(1) if packing.apart else None
    return Packer(order, packing, lambda members: sizes[members], apart)


def packed_positions(
    examples: TokenizedExamples, packing: Packing, **options: Any
) -> tuple[float, float]:
    """Mean tokens of a batch of `packed_batches`, and positions that the network computes for it.

    Args:
      examples: pairs or single responses.
      packing: number of rows, which share a batch equally.
      **options: as in `packed_batches`.
    """
    packer = packer_of(examples, packing, **options)
    assert packer.room is not None
    real = packer.order.batch_size * packed_sizes(examples)[:, 0].mean()
    return float(real), float(packing.rows * packer.room[0])


def packed_batches(
    examples: TokenizedExamples,
    packing: Packing,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
    **options: Any,
) -> Iterations:
    """Batches of pairs, or of single responses, of nearly equal size in rows of one length.

    A batch whose examples do not fit has padded rows alone (`PairBatch.packed` is None): at most
    two shapes. Its rows are as long as the longest row of the data, and so are those of the others,
    for whatever does not read packed rows.

    Args:
      examples: pairs or single responses.
      packing: number of rows.
      process_index: of `ordered_batches`.
      process_count: of `ordered_batches`; divides the shards.
      prefetch: of `ordered_batches`.
      **options: of `batch_order`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `PairBatch` with `get_state` and `set_state`.
    """
    packer, padded = packer_of(examples, packing, **options), padded_shape(examples)
    reach, longest = int(packed_sizes(examples)[:, 0].max()), int(examples.length.max())

    def make(at: Placement) -> PairBatch:
        packed, apart = None, None
        if packer.room is not None:
            packed = pack(examples, at, packer.room, reach=reach)
        if packer.room is not None and packer.room_apart is not None:
            room = np.array([packer.room_apart, packer.room[1]])
            apart = pack_apart(examples, at, room, reach=longest)
        return padded_pairs(
            examples, at.members, at.weight, *padded, packed=packed, packed_apart=apart
        )

    return placed_batches(
        packer,
        lambda members, at: make(at),
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )


def placed_batches(
    packer: Packer,
    make: Callable[[np.ndarray, Placement], Any],
    *,
    process_index: int,
    process_count: int,
    prefetch: int,
) -> Iterations:
    """The batches of a packer's order.

    Args:
      packer: of the examples.
      make: (examples of the whole batch, this process's part) -> the batch.
      process_index: of `ordered_batches`.
      process_count: of `ordered_batches`.
      prefetch: of `ordered_batches`.

    Raises:
      UserError: the processes cannot share each batch.
      ValueError: they cannot share the rows.
    """
    check_share(packer.order, process_index, process_count)
    shards = packer.packing.shards
    if shards % process_count:
        raise ValueError(f"{shards} shards cannot be shared by {process_count} processes")

    def batch(members: np.ndarray) -> Any:
        return make(members, packer.place(members, process_index, process_count))

    return iterate(packer.order, batch, prefetch=prefetch)
