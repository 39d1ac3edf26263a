"""`jaxalign evaluate --model M --data D`: held-out numbers of any model, without training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxalign.commands.pairs import PairOptions
from jaxalign.config import AtLeastOne, Finite, Words
from jaxalign.files import check_output, json_value, write_json
from jaxalign.flags import parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.reporting import print_table
from jaxalign.runs.held_out import evaluate


@dataclass(frozen=True, kw_only=True)
class Options:
    """Metrics of a model on preference pairs, as a run logs them of held-out pairs.

    Of a language model: log-probs, and with a reference loss, rewards, accuracy and KL. Of a reward
    or preference model: accuracy and calibration.
    """

    source: PairOptions
    reference: str | None = None
    """Reference model: Hugging Face folder, Hub name, run folder or GGUF file; None: for a run
    folder the model that the run was started from, else none."""
    loss: Words = "dpo"
    """Name of a loss in `jaxalign losses`, or FILE.py:FUNCTION."""
    loss_options: dict[str, Finite] = field(default_factory=dict)
    """Hyperparameters of the loss that differ from its defaults, e.g. beta 0.05."""
    limit: AtLeastOne | None = None
    """Largest number of pairs, counted from the first; None: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""
    steer: str | None = None
    """Steering vector of `jaxalign steer` for the model, not its reference: FILE, FILE:FACTOR, or
    FILE:null."""
    json: Path | None = None
    """JSON file to write the numbers to."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate and print the numbers."""
    options = parse(Options, "evaluate", arguments)
    if options.json is not None:
        check_output(options.json, "--json")
    enable_compilation_cache()
    metrics = evaluate(
        **vars(options.source),
        reference=options.reference,
        loss=options.loss,
        loss_options=options.loss_options,
        limit=options.limit,
        dtype=options.dtype,
        steer=options.steer,
    )
    if options.json is not None:
        write_json(options.json, json_value(metrics))
    rows = [
        [name, f"{value:,.0f}" if name == "pairs" else f"{value:.4g}"]
        for name, value in metrics.items()
    ]
    print_table(["metric", "value"], rows)
    return 0
