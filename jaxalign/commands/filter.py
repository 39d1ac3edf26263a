"""`jaxalign filter --model M --data D --output F`: leave out pairs of similar responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxalign.commands.pairs import PairOptions
from jaxalign.config import Fraction
from jaxalign.entanglement.pairs import load_pairs
from jaxalign.entanglement.similarity import least_similar, similarities, write_scored_pairs
from jaxalign.files import check_output
from jaxalign.flags import parse
from jaxalign.models.devices import enable_compilation_cache


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keep the pairs with the lowest similarity of chosen and rejected (arXiv:2410.08847)."""

    source: PairOptions
    output: Path
    """JSON Lines file to write."""
    by: Literal["ches", "ln_ches", "last_hidden", "edit"] = "ln_ches"
    """Similarity to filter by: CHES, its length-normalised form, the inner product of the last
    hidden states, or the negated edit distance."""
    keep: Fraction = 0.95
    """Fraction of the pairs to keep."""


def main(arguments: Sequence[str]) -> int:
    """Score every pair, keep the least alike, write them with their scores."""
    options = parse(Options, "filter", arguments)
    check_output(options.output, "--output")
    enable_compilation_cache()
    loaded = load_pairs(**vars(options.source))
    scores = similarities(loaded)
    own = scores[options.by]
    kept = least_similar(own, options.keep)
    write_scored_pairs(options.output, loaded, kept.tolist(), scores)
    for line in loaded.left_out:
        print(line)
    rest = np.delete(own, kept)
    lowest = f"{rest.min():.4g} on" if len(rest) else "none"
    print(
        f"{options.output}: {len(kept):,} of {len(own):,} pairs, {options.by} up to "
        f"{own[kept].max():.4g}; left out: {len(rest):,} from {lowest}"
    )
    return 0
