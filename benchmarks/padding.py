"""How much of a batch is padding: batches at random, batches of like length, and packed batches.

Command:  python -m benchmarks.padding --data pairs.jsonl --tokenizer FOLDER
Time:     seconds
Expect:   one table: the fraction of computed positions, and of rows of logits, that are padding in
          three epochs of training batches, and the number of shapes, each of which is a program

Positions of batches of like length are those of joint rows, where prompts are shared.

Nothing is trained: the batches are those that `jaxalign train` would see.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.machine import table
from jaxalign.data import (
    PairBatch,
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_pairs,
)
from jaxalign.data.packing import Packing, packed_pair_batches


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    data: tuple[str, ...]
    """Files of preference pairs."""
    tokenizer: str
    """Folder of the tokenizer."""
    max_length: int = 1024
    """Longest prompt plus response in tokens."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Pairs in a batch."""


def main(options: Options) -> None:
    """Measure and print."""
    tokenizer = load_tokenizer(options.tokenizer)
    header = ["data", "pairs", "batch", "batches", "padded positions", "padded logits", "programs"]
    rows = []
    for source in options.data:
        pairs, _ = tokenize_pairs(
            preference_records(source), tokenizer, max_length=options.max_length
        )
        for size in options.batch_sizes:
            order: dict[str, Any] = {"batch_size": size, "epochs": 3, "drop_remainder": True}
            forms = {
                "random": pair_batches(pairs, window=1, **order),
                "of like length": pair_batches(pairs, joint_share=0.75, **order),
                "packed": packed_pair_batches(pairs, Packing(), **order),
            }
            for name, batches in forms.items():
                counts = [_counts(batch) for batch in batches]
                real, computed, scored, logits = np.sum([x[:-1] for x in counts], axis=0)
                programs = len({x[-1] for x in counts})
                padding = (f"{1 - a / b:.1%}" for a, b in ((real, computed), (scored, logits)))
                rows.append([Path(source).stem, len(pairs), size, name, *padding, programs])
    print(table(header, rows))


def _counts(batch: PairBatch) -> tuple[Any, ...]:
    """Real and computed positions, real and computed rows of logits, and the program's shapes."""
    kept = batch.weight > 0
    scored = int(batch.response_length[kept].sum())
    packed, joint = batch.packed, batch.joint_tokens
    rows = batch.tokens if joint is None else joint
    real = int((batch.prompt_length + batch.response_length)[kept].sum())
    if joint is not None and batch.common_length is not None:
        real -= int(batch.common_length[kept].sum())
    if packed is None:
        return real, rows.size, scored, batch.response_tokens.size, rows.shape
    real = int((packed.segment_ids > 0).sum())
    return real, packed.tokens.size, scored, packed.scored_tokens.size, packed.tokens.shape


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
