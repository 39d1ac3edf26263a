"""Batches of prompts of fixed shapes, in an order that the seed alone decides."""

from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches import Iterations, Order, bucket_edges, iterate, share
from jaxalign.data.tokenize import TokenizedRows
from jaxalign.online.rollouts import PromptBatch


def prompt_batches(
    prompts: TokenizedRows,
    *,
    batch_size: int,
    seed: int = 0,
    buckets: int | Sequence[int] = 4,
    epochs: int | None = None,
    shuffle: bool = True,
    window: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> Iterations:
    """Batches of prompts, padded on the left.

    Args:
      prompts: from `tokenize_prompts`.
      batch_size: prompts per batch, over all processes.
      seed: of the order.
      buckets: lengths to pad to, or the largest number of lengths, chosen from the data.
      epochs: passes over the prompts; None: no end.
      shuffle: a new order in every epoch; off: as given.
      window: batches within which prompts are sorted by length.
      process_index: this process; it gets its part of every batch.
      process_count: processes that share each batch.
      prefetch: batches prepared ahead.

    Returns:
      An iterator of `PromptBatch` with `get_state` and `set_state`.
    """
    edges = bucket_edges(prompts.length, buckets)
    order = Order(
        lengths=prompts.length,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        window=window,
        epochs=epochs,
        drop_remainder=False,
    )

    def make(number: int) -> PromptBatch:
        members, mine, weight = share(order, number, process_index, process_count)
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

    return iterate(order, make, process_index, process_count, prefetch)
