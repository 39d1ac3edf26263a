"""Batches of stimuli of fixed shapes: plain rows for training, and the two stimuli of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.data import TokenizedRows
from jaxalign.data.batches import ROUNDING, bucket_edges, padded_positions
from jaxalign.data.order import Iterations, batch_order, ordered_batches
from jaxalign.data.packing import Packer, Packing, Placement, pack, packed_sizes, placed_batches
from jaxalign.data.tokenized import TokenizedResponses
from jaxalign.records import AnyArray, record
from jaxalign.rows import PackedRows


@record
class StimulusBatch:
    """Responses under the plain prompt and, axis `sides`, the positive and negative instruction."""

    tokens: Int[AnyArray, "rows length"]
    """Plain prompt and response, then zeros."""
    prompt_length: Int[AnyArray, " rows"]
    stimuli: Int[AnyArray, "rows sides longer"] | None
    """The same responses under each instruction; None: the plain row is also the stimulus."""
    stimuli_prompt_length: Int[AnyArray, "rows sides"] | None
    mask: Bool[AnyArray, "rows positions"]
    """Which of the first positions of a response have a token."""
    record_index: Int[AnyArray, " rows"]
    """Index of the response in its list."""
    weight: Float[AnyArray, " rows"]
    """1; 0 for the copies that fill a last, partial batch."""
    packed: PackedRows | None = None
    """The plain rows packed; None: not made."""
    packed_stimuli: tuple[PackedRows, PackedRows] | None = None
    """The rows of either side packed; None: not made."""


def stimulus_batches(
    plain: TokenizedRows,
    stimuli: Sequence[TokenizedRows] = (),
    *,
    positions: int,
    buckets: int | Sequence[int] = 4,
    packing: Packing | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
    **order: Any,
) -> Iterations:
    """Batches of stimuli.

    Args:
      plain: rows for training.
      stimuli: the same responses under the positive and the negative instruction, or nothing.
      positions: number of tokens of a response, from the first, that are compared.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the longest rows.
      packing: number of packed rows, of plain rows and of each stimulus; None: padded.
      process_index: of `ordered_batches`.
      process_count: of `ordered_batches`.
      prefetch: of `ordered_batches`.
      **order: of `batch_order`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `StimulusBatch` with `get_state` and `set_state`.
    """
    streams = [plain, *stimuli]
    lengths = np.max([stream.length for stream in streams], axis=0)
    edges = bucket_edges(lengths, buckets)
    response = plain.length - plain.prompt_length

    def rounded(needed: np.ndarray, edge: int) -> int:
        """The length of the longest row in a bucket or a shorter one, rounded up."""
        return -(-int(needed[lengths <= edge].max()) // ROUNDING) * ROUNDING

    def batch(edge: int, mine: np.ndarray, weight: np.ndarray) -> StimulusBatch:
        padded = [_padded(stream, mine, rounded(stream.length, edge)) for stream in streams]
        size = min(positions, rounded(response, edge))
        prompts = [stream.prompt_length[mine].astype(np.int32) for stream in streams]
        return StimulusBatch(
            tokens=padded[0],
            prompt_length=prompts[0],
            stimuli=_sides(padded[1:]) if stimuli else None,
            stimuli_prompt_length=np.stack(prompts[1:], axis=1) if stimuli else None,
            mask=np.arange(size)[None] < response[mine][:, None],
            record_index=plain.record_index[mine].astype(np.int32),
            weight=weight,
        )

    share = {"process_index": process_index, "process_count": process_count, "prefetch": prefetch}
    if packing is None:

        def padded(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> StimulusBatch:
            edge = edges[int(np.searchsorted(edges, lengths[members].max()))]
            return batch(edge, mine, weight)

        return ordered_batches(lengths, padded, **share, **order)

    packer = _packer(streams, packing, **order)

    def placed(members: np.ndarray, at: Placement) -> StimulusBatch:
        del members
        made = batch(edges[-1], at.members, at.weight)
        if at.rows is None or packer.room is None:
            return made
        rooms = packer.room.reshape(-1, 2)
        packed = [
            pack(TokenizedResponses(rows=stream), at, room, reach=int(stream.length.max()))
            for stream, room in zip(streams, rooms, strict=True)
        ]
        return dataclasses.replace(
            made, packed=packed[0], packed_stimuli=tuple(packed[1:]) if stimuli else None
        )

    return placed_batches(packer, placed, **share)


def stimulus_positions(
    plain: TokenizedRows,
    stimuli: Sequence[TokenizedRows],
    packing: Packing | None,
    **order: Any,
) -> float:
    """Mean number of positions of a batch of `stimulus_batches`, of all its streams.

    Args:
      plain: as in `stimulus_batches`.
      stimuli: as in `stimulus_batches`.
      packing: number of packed rows, into which a batch can be shared equally; None: padded.
      **order: of `batch_order`.
    """
    streams = [plain, *stimuli]
    if packing is None:
        return sum(padded_positions(TokenizedResponses(rows=x), **order) for x in streams)
    room = _packer(streams, packing, **order).room
    assert room is not None
    return packing.rows * float(room[::2].sum())


def _packer(streams: Sequence[TokenizedRows], packing: Packing, **order: Any) -> Packer:
    """The packer of `stimulus_batches`; its room is that of each stream in turn."""
    sizes = [packed_sizes(TokenizedResponses(rows=stream)) for stream in streams]
    each = np.concatenate(sizes, axis=1)
    lengths = np.max([stream.length for stream in streams], axis=0)
    return Packer(batch_order(lengths, sizes=each, **order), packing, lambda members: each[members])


def _padded(rows: TokenizedRows, members: np.ndarray, length: int) -> np.ndarray:
    tokens = np.zeros((len(members), length), np.int32)
    for at, member in enumerate(members):
        ids = rows[int(member)]
        tokens[at, : len(ids)] = ids
    return tokens


def _sides(padded: Sequence[np.ndarray]) -> np.ndarray:
    """Stack to [rows, sides, length of the longer side]."""
    longest = max(side.shape[1] for side in padded)
    return np.stack(
        [np.pad(side, ((0, 0), (0, longest - side.shape[1]))) for side in padded], axis=1
    )
