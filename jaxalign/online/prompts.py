"""Batches of prompts of fixed shapes, in an order that depends only on the seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.batches import bucket_edges
from jaxalign.data.order import Iterations, ordered_batches
from jaxalign.data.tokenized import TokenizedRows
from jaxalign.online.rollouts import PromptBatch


def prompt_batches(
    prompts: TokenizedRows, *, buckets: int | Sequence[int] = 4, **order: Any
) -> Iterations:
    """Batches of prompts, padded on the left.

    Args:
      prompts: from `tokenize_prompts`.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the data.
      **order: of `ordered_batches`: batch_size, seed, epochs and so on.

    Returns:
      An iterator of `PromptBatch` with `get_state` and `set_state`.
    """
    edges = bucket_edges(prompts.length, buckets)

    def make(members: np.ndarray, mine: np.ndarray, weight: np.ndarray) -> PromptBatch:
        edge = edges[int(np.searchsorted(edges, prompts.length[members].max()))]
        tokens = np.zeros((len(mine), edge), np.int32)
        for row, member in enumerate(mine):
            tokens[row, edge - prompts.length[member] :] = prompts[int(member)]
        return PromptBatch(
            tokens=tokens,
            length=prompts.length[mine].astype(np.int32),
            record_index=prompts.record_index[mine].astype(np.int32),
            weight=weight,
        )

    return ordered_batches(prompts.length, make, **order)
