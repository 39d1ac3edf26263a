"""`jaxalign filter`: leave out the pairs whose responses are too alike for the model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.commands.arguments import parser, within
from jaxalign.commands.pairs import ModelAndPairs, add_arguments, load
from jaxalign.config import Fraction
from jaxalign.entanglement.similarity import (
    HIDDEN_SIMILARITIES,
    edit_similarity,
    hidden_states_of_pairs,
)
from jaxalign.files import check_output, replacing
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.progress import track

SCORES = (*HIDDEN_SIMILARITIES, "edit")


def main(arguments: Sequence[str]) -> int:
    """Score every pair, keep the least alike, write them with their scores."""
    flags = parser(
        "filter",
        "Keep the pairs with the lowest similarity of chosen and rejected (arXiv:2410.08847).",
    )
    add_arguments(flags)
    flags.add_argument(
        "--by",
        choices=SCORES,
        default="ln_ches",
        help="similarity to filter by: CHES, its length-normalised form, the inner product of the "
        "last "
        "hidden states, or the negated edit distance",
    )
    flags.add_argument(
        "--keep", type=within(Fraction), default=0.95, help="fraction of the pairs to keep"
    )
    flags.add_argument("--output", type=Path, required=True, help="JSON Lines file to write")
    given = flags.parse_args(arguments)
    check_output(given.output, "--output")
    enable_compilation_cache()
    loaded = load(given)
    scores = similarities(loaded, given.batch_size)
    own = scores[given.by]
    kept = np.sort(np.argsort(own, kind="stable")[: math.ceil(given.keep * len(own))])
    numbers = np.asarray(loaded.pairs.record_index)
    with replacing(given.output) as scratch, scratch.open("w", encoding="utf-8") as file:
        for at in kept:
            record = loaded.records[int(numbers[at])]
            line: dict[str, Any] = {
                "prompt": record.prompt,
                "chosen": record.chosen,
                "rejected": record.rejected,
            }
            line |= {name: float(values[at]) for name, values in scores.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for words in loaded.left_out:
        print(words)
    print(
        f"{given.output}: {len(kept):,} of {len(own):,} pairs, {given.by} up to "
        f"{own[kept].max():.4g}; left out: {len(own) - len(kept):,} from {_lowest(own, kept)}"
    )
    return 0


def _lowest(own: np.ndarray, kept: np.ndarray) -> str:
    """The lowest similarity among those left out."""
    rest = np.delete(own, kept)
    return f"{rest.min():.4g} on" if len(rest) else "none"


def similarities(loaded: ModelAndPairs, batch_size: int) -> dict[str, np.ndarray]:
    """Every similarity of every pair, in the order of `loaded.pairs`."""
    model = loaded.model

    @jax.jit
    def of_batch(params: Any, batch: Any) -> dict[str, Any]:
        hidden = hidden_states_of_pairs(params, model.config, batch)
        return {
            name: function(hidden, batch.response_length)
            for name, function in HIDDEN_SIMILARITIES.items()
        }

    parts = []
    for batch in track(loaded.batches(batch_size), "similarities", unit="batch"):
        real = np.asarray(batch.weight) > 0
        found = jax.device_get(of_batch(model.params, batch))
        found = {name: values[real] for name, values in found.items()}
        rows = zip(batch.response_tokens[real], batch.response_length[real], strict=True)
        found["edit"] = np.array(
            [
                edit_similarity(*(side[:n] for side, n in zip(sides, lengths, strict=True)))
                for sides, lengths in rows
            ]
        )
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in SCORES}
