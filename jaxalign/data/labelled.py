"""Batches of single responses with a label each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from jaxalign.data.batches import ROUNDING, PairBatch, bucket_edges
from jaxalign.data.order import Iterations, ordered_batches
from jaxalign.data.tokenize import TokenizedRows
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
    """

    responses: PairBatch
    mismatched: PairBatch | None
    desirable: Bool[AnyArray, " rows"]

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
    **order: Any,
) -> Iterations:
    """Batches of labelled responses.

    Args:
      data: rows and labels.
      max_length: most tokens of a prompt with another row's response; longer prompts lose their
        beginning.
      mismatched: whose response a prompt also gets.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the data.
      **order: of `ordered_batches`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `LabelledBatch` with `get_state` and `set_state`.
    """
    rows, length = data.rows, data.rows.length
    response = length - rows.prompt_length
    edges = bucket_edges(length, buckets)
    widest = _rounded(int(response.max()))
    longest = min(max_length, int(rows.prompt_length.max() + response.max()))

    def parts_of(row: int) -> tuple[np.ndarray, np.ndarray]:
        return rows[row][: rows.prompt_length[row]], rows[row][rows.prompt_length[row] :]

    def partners(members: np.ndarray, mine: np.ndarray) -> list[int]:
        if mismatched == "all":
            return ((mine + 1) % len(data)).tolist()
        after = dict(zip(members.tolist(), np.roll(members, -1).tolist(), strict=True))
        return [after[one] for one in mine.tolist()]

    def make(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> LabelledBatch:
        size = edges[int(np.searchsorted(edges, length[members].max()))]
        own = [parts_of(i) for i in mine.tolist()]
        other = None
        if mismatched != "none":
            texts = [
                _cut(prompt, parts_of(j)[1], longest)
                for (prompt, _), j in zip(own, partners(members, mine), strict=True)
            ]
            other = _one_side(texts, _rounded(longest), widest, rows.record_index[mine], weight)
        return LabelledBatch(
            responses=_one_side(own, size, min(size, widest), rows.record_index[mine], weight),
            mismatched=other,
            desirable=data.desirable[mine],
        )

    return ordered_batches(length, make, **order)


def _rounded(length: int) -> int:
    return -(-length // ROUNDING) * ROUNDING


def _cut(prompt: np.ndarray, response: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and a response of at most so many tokens together; the prompt keeps its end."""
    response = response[: length - 1]
    return prompt[max(0, len(prompt) + len(response) - length) :], response


def _one_side(
    texts: Sequence[tuple[np.ndarray, np.ndarray]],
    length: int,
    response: int,
    record_index: np.ndarray,
    weight: np.ndarray,
) -> PairBatch:
    """Prompts and responses, padded to these lengths."""
    tokens = np.zeros((len(texts), 1, length), np.int32)
    responses = np.zeros((len(texts), 1, response), np.int32)
    for row, (prompt, answer) in enumerate(texts):
        tokens[row, 0, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
        responses[row, 0, : len(answer)] = answer
    return PairBatch(
        tokens=tokens,
        prompt_length=np.array([[len(prompt)] for prompt, _ in texts], np.int32),
        response_tokens=responses,
        response_length=np.array([[len(answer)] for _, answer in texts], np.int32),
        record_index=record_index.astype(np.int32),
        weight=weight,
    )
