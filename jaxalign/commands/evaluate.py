"""`jaxalign evaluate --model M --data D`: held-out numbers or task scores of any model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxalign.commands.pairs import PairReading
from jaxalign.config import AtLeastOne, Count, Finite, Words
from jaxalign.data.written import input_files
from jaxalign.errors import UserError
from jaxalign.files import check_output, json_value, write_json
from jaxalign.flags import parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.reporting import print_table, tasks
from jaxalign.runs.held_out import evaluate
from jaxalign.runs.tasks import evaluate_tasks


@dataclass(frozen=True, kw_only=True)
class PairFlags:
    """What pairs are evaluated by."""

    loss: Words = "dpo"
    """Name of a loss in `jaxalign losses`, or FILE.py:FUNCTION."""
    loss_options: dict[str, Finite] = field(default_factory=dict)
    """Hyperparameters of the loss that differ from its defaults, e.g. beta 0.05."""


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """Tasks of the lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Tasks of the lm-evaluation-harness (extra lm-eval) instead of pairs: names, with * and ?, or
    paths of task files. A run folder is evaluated beside the model that it was started from."""
    tasks_folder: Path | None = None
    """Folder of task files besides the harness's own."""
    few_shot: Count | None = None
    """Number of examples before a task's question; None: the task's own."""
    few_shot_turns: bool = True
    """Show a task's examples as turns with --chat always; if not, within the user's turn."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Metrics of a model on preference pairs, as a run logs them of held-out pairs; or on tasks.

    Of a language model: log-probs, and with a reference loss, rewards, accuracy and KL. Of a reward
    or preference model: accuracy and calibration. On tasks of the lm-evaluation-harness: their
    scores with 95 % intervals, beside those of the reference. Texts of tasks go through the chat
    template with --chat always only.
    """

    model: str
    """Model: Hugging Face folder, Hub name, run folder or GGUF file."""
    data: str | None = None
    """Preference pairs, as --data of `jaxalign train`; needed without --tasks."""
    on_tasks: TaskFlags
    reading: PairReading
    reference: str | None = None
    """Reference model: Hugging Face folder, Hub name, run folder or GGUF file; None: for a run
    folder the model that the run was started from, else none."""
    on_pairs: PairFlags
    limit: AtLeastOne | None = None
    """Largest number of pairs, or of documents of each task, counted from the first; None: all."""
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
    _check(options)
    if options.json is not None:
        read = [*input_files(options.data), options.model, options.reference, options.steer]
        check_output(options.json, "--json", inputs=[*read, *options.on_tasks.tasks])
    enable_compilation_cache()
    shared = {name: getattr(options, name) for name in ("reference", "limit", "dtype", "steer")}
    if options.on_tasks.tasks:
        names = ("tokenizer", "chat", "batch_size")
        reading = {name: getattr(options.reading, name) for name in names}
        report = evaluate_tasks(options.model, **vars(options.on_tasks), **reading, **shared)
        if options.json is not None:
            write_json(options.json, json_value(report))
        print_table(*tasks.table([("", report)]))
        for line in tasks.notes([("", report)]):
            print(line)
        return 0
    metrics = evaluate(
        options.model,
        str(options.data),
        **vars(options.reading),
        **vars(options.on_pairs),
        **shared,
    )
    if options.json is not None:
        write_json(options.json, json_value(metrics))
    rows = [
        [name, f"{value:,.0f}" if name == "pairs" else f"{value:.4g}"]
        for name, value in metrics.items()
    ]
    print_table(["metric", "value"], rows)
    return 0


def _check(options: Options) -> None:
    """See to it that pairs or tasks are given, and no flags of the other."""
    if (options.data is None) == (not options.on_tasks.tasks):
        raise UserError("give --data or --tasks; see jaxalign evaluate --help")
    foreign: dict[str, object] = vars(options.on_tasks)
    usual: dict[str, object] = vars(TaskFlags())
    if options.on_tasks.tasks:
        foreign = vars(options.on_pairs) | vars(options.reading)
        usual = vars(PairFlags()) | vars(PairReading())
        usual |= {name: foreign[name] for name in ("tokenizer", "chat", "batch_size")}
    for name, value in foreign.items():
        if value != usual[name]:
            use = "--data" if options.on_tasks.tasks else "--tasks"
            raise UserError(f"--{name.replace('_', '-')}: has a meaning with {use} only")
