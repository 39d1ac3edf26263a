"""How much of a batch is padding: batches at random, batches of like length, and packed batches.

Command:  python -m benchmarks.padding --data pairs.jsonl --tokenizer FOLDER
Time:     seconds
Expect:   two tables, of pairs and of their chosen responses (SFT): the fraction of computed
          positions, and of rows of logits, that are padding in three epochs of training batches,
          and the number of shapes, each of which is a program

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
    TokenizedResponses,
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_pairs,
    tokenize_responses,
)
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.data.tokenized import TokenizedExamples
from jaxalign.representation import responses_of


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
    """Pairs, or responses, in a batch."""


def main(options: Options) -> None:
    """Measure and print."""
    tokenizer = load_tokenizer(options.tokenizer)
    header = ["batch", "batches", "padded positions", "padded logits", "programs"]
    pair_rows, response_rows = [], []
    for source in options.data:
        name, records = Path(source).stem, list(preference_records(source))
        pairs, _ = tokenize_pairs(records, tokenizer, max_length=options.max_length)
        chosen, _ = tokenize_responses(
            responses_of(records, "chosen"), tokenizer, max_length=options.max_length
        )
        responses = TokenizedResponses(rows=chosen)
        pair_rows += [[name, len(pairs), *row] for row in measured(pairs, options)]
        response_rows += [[name, len(responses), *row] for row in measured(responses, options)]
    print(table(["data", "pairs", *header], pair_rows), end="\n\n")
    print(table(["data", "responses", *header], response_rows))


def measured(examples: TokenizedExamples, options: Options) -> list[list[Any]]:
    """A row of the table for each size and kind of batches."""
    rows = []
    for size in options.batch_sizes:
        order: dict[str, Any] = {"batch_size": size, "epochs": 3, "drop_remainder": True}
        shared = {"joint_share": 0.75 if examples.sides > 1 else 0.0}
        forms = {
            "random": pair_batches(examples, window=1, **order),
            "of like length": pair_batches(examples, **shared, **order),
            "packed": packed_batches(examples, Packing(), **order),
        }
        for name, batches in forms.items():
            counts = [_counts(batch) for batch in batches]
            real, computed, scored, logits = np.sum([x[:-1] for x in counts], axis=0)
            programs = len({x[-1] for x in counts})
            padding = (f"{1 - a / b:.1%}" for a, b in ((real, computed), (scored, logits)))
            rows.append([size, name, *padding, programs])
    return rows


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
