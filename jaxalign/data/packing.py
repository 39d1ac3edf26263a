"""Batches of pairs packed in long rows of one length, so that almost nothing is padding."""

from dataclasses import dataclass
from typing import Any

import numpy as np

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
from jaxalign.data.tokenize import TokenizedPairs
from jaxalign.rows import PackedPairs

SLACK = 1.25 * TOLERANCE
"""Fraction by which rows are longer than those of the first batches: later ones may need it."""
FIRST = 64
"""Least number of batches from which the length of the rows is chosen."""
STEP = 1 / 128
"""Rounding of lengths, as a fraction of them."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How many packed rows make up a batch: one for each micro-batch of each shard."""

    shards: int = 1
    """Number of shards of a batch on the devices, over data and fsdp."""
    micro_batches: int = 1
    """Number of micro-batches."""

    @property
    def rows(self) -> int:
        """Packed rows of a batch."""
        return self.shards * self.micro_batches


@dataclass(frozen=True, kw_only=True)
class PackedShape:
    """The one shape of all packed batches."""

    length: int
    """Tokens of a row."""
    scored: int
    """Scored tokens of a row."""
    reach: int
    """Tokens of the longest pair."""


class PairPacker:
    """The batches of an order, packed; those that do not fit are left as padded rows.

    Args:
      pairs: from `tokenize_pairs`.
      order: of the pairs, with `pair_sizes` as its sizes.
      packing: number of rows.
    """

    def __init__(self, pairs: TokenizedPairs, order: BatchOrder, packing: Packing):
        assert order.sizes is not None
        self._pairs, self.order, self._packing = pairs, order, packing
        self._sizes, self._common = order.sizes, common_lengths(pairs)
        self.padded = _padded_shape(pairs)
        """Tokens of an unpacked row, and of a response."""
        self.shape = self._shape()
        """Of the packed rows; None: the pairs of a batch cannot be shared equally by the rows."""

    def _shape(self) -> PackedShape | None:
        if self.order.batch_size % self._packing.rows:
            return None
        number = max(FIRST, -(-len(self._pairs) // self.order.batch_size) + 1)
        if self.order.num_batches is not None:
            number = min(number, self.order.num_batches)
        most = np.zeros(2)
        for at in range(number):
            most = np.maximum(most, self._rows(self.order.batch(at))[2])
        more = 1 if self.order.num_batches == number else 1 + SLACK
        length, scored = (_rounded(more * size) for size in most)
        return PackedShape(length=length, scored=scored, reach=int(self._sizes[:, 0].max()))

    def _rows(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch in the order of its rows, its weights, and the sizes of the longest row."""
        packing = self._packing
        filled, weight = filled_batch(members, self.order.batch_size)
        sizes = self._sizes[filled] * (weight > 0)[:, None]
        groups = balanced_groups(sizes, packing.rows, np.random.default_rng(0))
        most = sizes[groups].sum(1).max(0)
        # pair p of a batch is in micro-batch p % micro_batches (`split_micro_batches`)
        groups = groups.reshape(packing.shards, packing.micro_batches, -1)
        places = groups.swapaxes(1, 2).ravel()
        return filled[places], weight[places], most

    def batch(
        self, members: np.ndarray, process_index: int = 0, process_count: int = 1
    ) -> PairBatch:
        """A process's part of a batch.

        Args:
          members: the pairs of the whole batch.
          process_index: of `ordered_batches`.
          process_count: of `ordered_batches`; divides the shards.
        """
        packing, shape = self._packing, self.shape
        if shape is None:
            filled, weight = filled_batch(members, self.order.batch_size)
            mine, weight = (share_of(x, process_index, process_count) for x in (filled, weight))
            return padded_pairs(self._pairs, mine, weight, *self.padded)
        filled, weight, most = self._rows(members)
        mine, weight = (share_of(x, process_index, process_count) for x in (filled, weight))
        fits = most[0] <= shape.length and most[1] <= shape.scored
        if not fits:
            return padded_pairs(self._pairs, mine, weight, *self.padded)
        rows = packing.rows // process_count
        grid = np.arange(len(mine)).reshape(-1, len(mine) // rows, packing.micro_batches)
        grid = grid.swapaxes(1, 2).reshape(rows, -1)  # the pairs of each row
        mine = _copies_beside(mine, weight, grid)
        packed = self._pack(mine, weight, grid, shape, first_row=process_index * rows)
        return padded_pairs(self._pairs, mine, weight, *self.padded, packed=packed)

    def _pack(
        self,
        members: np.ndarray,
        weight: np.ndarray,
        grid: np.ndarray,
        shape: PackedShape,
        *,
        first_row: int,
    ) -> PackedPairs:
        rows = len(grid)
        tokens, positions, segment_ids = np.zeros((3, rows, shape.length), np.int32)
        scored_positions, scored_tokens = np.zeros((2, rows, shape.scored), np.int32)
        row_of = np.zeros(len(members), np.int32)
        scored_start = np.zeros((len(members), 2), np.int32)
        for row, group in enumerate(grid):
            at, scored, kept = 0, 0, {}
            real_first = group[np.argsort(-weight[group], kind="stable")]
            for number, place in enumerate(real_first):
                row_of[place] = first_row + row
                member = int(members[place])
                if weight[place] == 0 and member in kept:  # the same tokens, not once more
                    scored_start[place] = kept[member]
                    continue
                chosen, rejected = (self._pairs.rows[2 * member + side] for side in (0, 1))
                common, first = int(self._common[member]), len(chosen)
                ids = np.concatenate([chosen, rejected[common:]])
                index = np.arange(len(ids))
                own = slice(at, at + len(ids))
                tokens[row, own] = ids
                positions[row, own] = np.where(index < first, index, index - first + common)
                part = np.where(index >= first, 3, np.where(index < common, 1, 2))
                segment_ids[row, own] = 3 * number + part
                for side, whole in enumerate((chosen, rejected)):
                    prompt = int(self._pairs.prompt_length[member, side])
                    before = np.arange(prompt - 1, len(whole) - 1)
                    if side == 1:
                        before = np.where(before < common, before, before + first - common)
                    scored_start[place, side] = scored
                    own = slice(scored, scored + len(before))
                    scored_positions[row, own] = at + before
                    scored_tokens[row, own] = whole[prompt:]
                    scored += len(before)
                kept[member] = scored_start[place]
                at += len(ids)
        return PackedPairs(
            tokens=tokens,
            positions=positions,
            segment_ids=segment_ids,
            scored_positions=scored_positions,
            scored_tokens=scored_tokens,
            row_number=np.arange(first_row, first_row + rows, dtype=np.int32),
            row=row_of,
            scored_start=scored_start,
            reach=shape.reach,
        )


def _copies_beside(members: np.ndarray, weight: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The batch with the copies in each row copies of a real pair in it, where it has one."""
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


def _padded_shape(pairs: TokenizedPairs) -> tuple[int, int]:
    """Tokens of a row, and of a response, that hold every pair."""
    longest = int(pairs.length.max()), int(pairs.response_length.max())
    length, response = (-(-size // 8) * 8 for size in longest)
    return length, min(response, length)


def pair_sizes(pairs: TokenizedPairs) -> np.ndarray:
    """Int [pairs, 2]: tokens of each pair with its common prefix once, and scored tokens."""
    return np.stack(
        [pairs.length.sum(1) - common_lengths(pairs), pairs.response_length.sum(1)], axis=1
    )


def pair_packer(pairs: TokenizedPairs, packing: Packing, **options: Any) -> PairPacker:
    """The batches of `packed_pair_batches`, whose options these are."""
    order = batch_order(pairs.length.max(1), sizes=pair_sizes(pairs), **options)
    return PairPacker(pairs, order, packing)


def packed_pair_batches(
    pairs: TokenizedPairs,
    packing: Packing,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
    **options: Any,
) -> Iterations:
    """Batches of pairs of nearly equal size, packed in rows of one length.

    A batch whose pairs do not fit has padded rows alone (`PairBatch.packed` is None): at most two
    shapes. Its rows are as long as the longest row of the data, and so are those of the others,
    for whatever does not read packed rows.

    Args:
      pairs: from `tokenize_pairs`.
      packing: number of rows.
      process_index: of `ordered_batches`.
      process_count: of `ordered_batches`; divides the shards.
      prefetch: of `ordered_batches`.
      **options: of `batch_order`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `PairBatch` with `get_state` and `set_state`.
    """
    packer = pair_packer(pairs, packing, **options)
    check_share(packer.order, process_index, process_count)
    if packing.shards % process_count:
        raise ValueError(f"{packing.shards} shards cannot be shared by {process_count} processes")
    return iterate(
        packer.order,
        lambda members: packer.batch(members, process_index, process_count),
        prefetch=prefetch,
    )
