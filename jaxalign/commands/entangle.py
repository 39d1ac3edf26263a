"""`jaxalign entangle --model M --data D`: a page on the gradients of chosen and rejected."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.commands.pairs import PairOptions
from jaxalign.config import AtLeastOne, Count, Words
from jaxalign.entanglement import CASES
from jaxalign.entanglement.measurements import (
    HeatMapParameters,
    heat_maps,
    loss_row,
    measure,
    most_and_least_entangled,
    pair_rows,
    write_pair_rows,
)
from jaxalign.entanglement.pairs import load_pairs, load_reference
from jaxalign.entanglement.similarity import similarities
from jaxalign.errors import UserError
from jaxalign.files import check_output
from jaxalign.flags import parse
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.losses.lookup import find_loss
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.reporting import print_table
from jaxalign.reporting.entanglement_page import Page, write_page


@dataclass(frozen=True, kw_only=True)
class Options:
    """The gradients of chosen and rejected responses of a model, as a page to read.

    Cases, the most and the least entangled pairs, token heat maps, and what each loss would do
    (arXiv:2410.13828).
    """

    source: PairOptions
    reference: str | None = None
    """Reference model: Hugging Face folder; None: the model itself."""
    loss: Words = "dpo"
    """Name of a loss in `jaxalign losses`, or FILE.py:FUNCTION."""
    pairs: AtLeastOne = 64
    """Number of pairs to measure, counted from the first."""
    heat_maps: Count = 2
    """Number of most and of least entangled pairs that get a heat map."""
    heat_map_tokens: AtLeastOne = 40
    """Number of tokens of each response, counted from the first, in a heat map."""
    heat_map_parameters: HeatMapParameters = "all"
    """Parameters whose gradients the heat maps compare: all (one backward pass per token), or the
    unembedding alone (one forward pass)."""
    output: Path = Path("entanglement")
    """Folder to write."""


def main(arguments: Sequence[str]) -> int:
    """Measure, write the folder, print the table."""
    options = parse(Options, "entangle", arguments)
    loss = find_loss(options.loss, {})
    if loss.reads == "tokens":
        raise UserError(f"loss: {options.loss} reads whole distributions; set another")
    check_output(options.output, "--output", folder=True)
    enable_compilation_cache()
    loaded = load_pairs(**vars(options.source), limit=options.pairs)
    geometry, pairs = measure(loaded, load_reference(options.reference, loaded))
    losses = {options.loss: loss.function} | PREFERENCE_LOSSES
    page = Page(
        model=options.source.model,
        data=options.source.data,
        loss=options.loss,
        left_out=loaded.left_out,
        pairs=pair_rows(loaded, geometry, pairs, loss.function, similarities(loaded)),
        losses=[loss_row(name, one, geometry, pairs) for name, one in losses.items()],
        heat_maps=[],
        heat_map_parameters="all parameters"
        if options.heat_map_parameters == "all"
        else "the unembedding alone",
    )
    write_pair_rows(page.pairs, options.output / "pairs.jsonl")
    write_page(page, options.output)  # what is kept if the heat maps, which are slow, are stopped
    maps = heat_maps(
        loaded,
        most_and_least_entangled(geometry, options.heat_maps),
        limit=options.heat_map_tokens,
        parameters=options.heat_map_parameters,
    )
    path = write_page(dataclasses.replace(page, heat_maps=maps), options.output)
    for line in page.left_out:
        print(line)
    header = ["loss", *CASES, "d_w/d_l"]
    print_table(header, [[row.name, *row.cells(header[1:])] for row in page.losses])
    print(f"{len(page.pairs)} pairs; page: {path}")
    return 0
