"""How much of a batch is padding, with batches of like length and with batches at random.

Command:  python -m benchmarks.padding --data pairs.jsonl --tokenizer FOLDER
Time:     seconds
Expect:   one table: the fraction of padded positions in three epochs of training batches

Nothing is trained: the batches are those that `jaxalign train` would see.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from jaxalign.data import load_tokenizer, pair_batches, preference_records, tokenize_pairs


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
    print("| data | pairs | batch | padding, random batches | padding, batches of like length |")
    print("|---|---|---|---|---|")
    for source in options.data:
        pairs, _ = tokenize_pairs(
            preference_records(source), tokenizer, max_length=options.max_length
        )
        for size in options.batch_sizes:
            fractions = []
            for window in (1, 16):
                batches = list(pair_batches(pairs, batch_size=size, epochs=3, window=window))
                real = sum(int((b.prompt_length + b.response_length).sum()) for b in batches)
                real -= sum(_filler(b) for b in batches)
                fractions.append(1 - real / sum(b.tokens.size for b in batches))
            random, alike = fractions
            print(f"| {Path(source).stem} | {len(pairs)} | {size} | {random:.0%} | {alike:.0%} |")


def _filler(batch) -> int:
    """Tokens of the copies that fill up a last batch."""
    lengths = batch.prompt_length + batch.response_length
    return int(np.sum(lengths[batch.weight == 0]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
