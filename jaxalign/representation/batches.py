"""Batches of stimuli of fixed shapes: plain rows for training, and the two stimuli of each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.data import TokenizedRows
from jaxalign.data.batches import ROUNDING, bucket_edges
from jaxalign.data.order import Iterations, ordered_batches
from jaxalign.records import AnyArray, record


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


def stimulus_batches(
    plain: TokenizedRows,
    stimuli: Sequence[TokenizedRows] = (),
    *,
    positions: int,
    buckets: int | Sequence[int] = 4,
    **order: Any,
) -> Iterations:
    """Batches of stimuli.

    Args:
      plain: rows for training.
      stimuli: the same responses under the positive and the negative instruction, or nothing.
      positions: number of tokens of a response, from the first, that are compared.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the longest rows.
      **order: of `ordered_batches`: batch_size, seed, epochs and so on.

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

    def make(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> StimulusBatch:
        edge = edges[int(np.searchsorted(edges, lengths[members].max()))]
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

    return ordered_batches(lengths, make, **order)


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
