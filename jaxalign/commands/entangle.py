"""`jaxalign entangle --model M --data D`: a page on the gradients of chosen and rejected."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxalign.commands.pairs import PairOptions
from jaxalign.config import AtLeastOne, Count, NonNegative, Words
from jaxalign.data.written import input_files
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
from jaxalign.entanglement.pairs import ModelAndPairs, load_pairs, load_reference
from jaxalign.entanglement.similarity import similarities
from jaxalign.errors import UserError
from jaxalign.files import check_output
from jaxalign.flags import parse
from jaxalign.losses import PREFERENCE_LOSSES, Loss
from jaxalign.losses.lookup import find_loss
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.reporting import print_table
from jaxalign.reporting.entanglement_page import Page, write_page
from jaxalign.reporting.ledger import StepLedger
from jaxalign.stages.ledger import moved_most, pair_entries
from jaxalign.training.ledger import SIDES
from jaxalign.training.one_step import ledger_of_step
from jaxalign.training.optimizers import make_optimizer


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
    ledger: Count = 0
    """Number of pairs, counted from the first, that make one update, whose changes of log-probs are
    split by where they come from; as many after them are watched, too. 0: no update."""
    optimizer: Literal["adamw", "adafactor", "lion", "rmsprop", "sgd"] = "adamw"
    """Update rule of the ledger's step, with the defaults of `jaxalign train`."""
    learning_rate: NonNegative = 1e-6
    """Learning rate of the ledger's step."""
    output: Path = Path("entanglement")
    """Folder to write."""


def ledger_of(options: Options, loaded: ModelAndPairs, reference: Any, loss: Loss) -> StepLedger:
    """The ledger of one update, as the page shows it."""
    rule = make_optimizer(options.optimizer, options.learning_rate)
    entries, batches = ledger_of_step(loaded, reference, loss, rule, pairs=options.ledger)
    moved = {
        name: {
            side: moved_most(one, batches[name], at, loaded.tokenizer)
            for at, side in enumerate(SIDES)
        }
        for name, one in entries.items()
    }
    rows = {
        name: [
            (loaded.source(row["record"]), row["chosen"], row["rejected"])
            for row in pair_entries(one, batches[name])
        ]
        for name, one in entries.items()
    }
    step = f"{options.loss}, {options.optimizer}, learning rate {options.learning_rate:g}"
    return StepLedger(step=step, pairs=rows, tokens=moved)


def main(arguments: Sequence[str]) -> int:
    """Measure, write the folder, print the table."""
    options = parse(Options, "entangle", arguments)
    loss = find_loss(options.loss, {})
    if loss.reads == "tokens":
        raise UserError(f"loss: {options.loss} reads whole distributions; set another")
    check_output(
        options.output,
        "--output",
        folder=True,
        files=["pairs.jsonl"],
        inputs=input_files(options.source.data),
    )
    enable_compilation_cache()
    loaded = load_pairs(**vars(options.source), limit=options.pairs)
    reference = load_reference(options.reference, loaded)
    geometry, pairs = measure(loaded, reference)
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
        ledger=ledger_of(options, loaded, reference, loss) if options.ledger else None,
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
