"""The paper's comparison on a real chat model: eight online methods, a sweep, all against all.

Command:  python -m experiments.ipo_md.small --model FOLDER [--processes 8] [--minutes 6]
Needs:    weights of a small chat model; JAXALIGN_SHARED with UltraFeedback, polite pairs, PandaLM
Time:     minutes on an accelerator; with the README's sizes, a few hours on one CPU core
Expect:   the sections "small ..." of this folder's README, small.png, small_reliability.png

The policy is a chat model of 135M parameters with LoRA adapters. A reward model and a preference
model of its size learn from half of the pairs of `small_data.py`, a judge from the other half with
another seed (`small_annotators.py`); no policy learns from the judge. Each method's strength is
chosen by the win rate over the reference in the eyes of its own annotator; then several seeds of
each write responses to test prompts, which are judged all against all (`small_runs.py`). The runs
of a method advance together (`together.py`).

The work is done in cells: an annotator, a method's sweep, a method's runs; `--processes` of them
run at a time. What is finished is not done again. Rows of numbers and the responses to the test
prompts are kept in `--rows`, so any other judge can read them later.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.ipo_md import small_data, small_runs, small_tables
from experiments.ipo_md.small_annotators import train_annotator
from experiments.ipo_md.small_options import (
    ANNOTATORS,
    METHODS,
    Options,
    is_done,
    rows_of,
    write_rows,
)
from experiments.rows import models_of, same_options
from jaxalign.errors import UserError
from jaxalign.models.devices import enable_compilation_cache

ORDER = ("annotators", "sweep", "final", "judge")
"""The steps."""


def main(options: Options) -> None:
    """All cells that are missing, then the tables."""
    if options.cell:
        return run_cell(options)
    if unknown := set(options.methods) - set(METHODS):
        sys.exit(f"--methods: {', '.join(sorted(unknown))}: not one of {', '.join(METHODS)}")
    started = time.time()
    end = started + 60 * options.minutes if options.minutes else float("inf")
    steps = {
        "annotators": [f"annotator:{name}" for name in ANNOTATORS],
        "sweep": ["reference:", *(f"sweep:{name}" for name in options.methods)],
        "final": [f"final:{name}" for name in options.methods],
        "judge": ["judge:"],
    }
    if options.step != "annotators":  # the sweep's programs are compiled meanwhile
        steps["sweep"] = steps.pop("annotators") + steps["sweep"]
    rows = Path(options.rows)
    same_options(rows.with_name(f"{rows.name}_options.json"), models_of(model=options.model))
    rows.mkdir(parents=True, exist_ok=True)
    small_data.prepare(options)
    for name in [name for name in ORDER if name in steps]:
        if name == "final":
            options = dataclasses.replace(options, updates=affordable(options, end - time.time()))
        pool(options, [x for x in steps[name] if is_missing(options, x)], end)
        print(f"{name}: ended after {time.time() - started:.0f} s", flush=True)
        if options.step == name:
            return None
    print(small_tables.write(Path(options.rows), Path(__file__).parent))
    return None


def is_missing(options: Options, cell: str) -> bool:
    """Whether a cell has no rows, or not all, made with these options."""
    kind, _, name = cell.partition(":")
    if kind == "judge" and small_runs.unjudged(options):
        return True
    if kind == "sweep":
        return bool(small_runs.untried(small_runs.swept(options, name), name))
    if kind in ("final", "reference"):
        have = {row["seed"] for row in small_runs.finished(options, name or kind)}
        return not have.issuperset(options.seeds)
    return not is_done(options, cell)


# ------------------------------------------------------------------------------ processes


def pool(options: Options, cells: Sequence[str], end: float) -> None:
    """Run cells, some at a time, until all are done or the time is over."""
    if options.processes == 1:
        for at, cell in enumerate(cells):
            if time.time() >= end:
                print("no time for", *cells[at:], flush=True)
                return
            run_cell(dataclasses.replace(options, cell=cell))
            jax.clear_caches()
        return
    waiting, running = list(cells), {}
    memory = options.memory / max(1, min(options.processes, len(cells)))
    while waiting or running:
        while waiting and len(running) < options.processes and time.time() < end:
            cell = waiting.pop(0)
            log = Path(options.folder) / "logs" / f"{cell.replace(':', '_')}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            running[cell] = started(options, cell, log, memory), log, time.time()
        if not running:  # no time is left
            print("no time for", *waiting, flush=True)
            return
        for cell, (process, log, since) in list(running.items()):
            if process.poll() is not None:
                del running[cell]
                seconds = time.time() - since
                ended = "done" if process.returncode == 0 else "FAILED"
                print(f"{cell} {ended} after {seconds:.0f} s", flush=True)
                if process.returncode:
                    print(log.read_text(errors="replace")[-2000:], flush=True)
                if process.returncode and cell.startswith("annotator"):
                    for other, *_ in running.values():  # they would wait for it
                        other.terminate()
                    sys.exit(f"{cell}: no policy can be trained without it")
        time.sleep(0.2)


def started(options: Options, cell: str, log: Path, memory: float) -> subprocess.Popen:
    """A process for one cell, with its part of an accelerator's memory."""
    flags = []
    for field in dataclasses.fields(options):
        value = cell if field.name == "cell" else getattr(options, field.name)
        values = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
        flags += [f"--{field.name.replace('_', '-')}", *values]
    cache = str(Path(options.folder).resolve() / "compiled")
    given = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory:.3f}",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
    }
    command = [sys.executable, "-m", "experiments.ipo_md.small", *flags]
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=os.environ | given, stdout=file, stderr=subprocess.STDOUT
        )


def affordable(options: Options, seconds: float) -> int:
    """Updates of the final runs that fit into a time, by the speed of the sweep's."""
    speeds = [row["seconds_per_update"] for row in rows_of(options, "sweep")]
    if seconds == float("inf") or not speeds:
        return options.updates
    waves = -(-len(options.methods) // options.processes)
    # a process takes half a minute to begin, the judge another; a third of the time is evaluation
    free = (seconds - 30) / waves - 30
    updates = int(free / (1.5 * max(speeds))) // 8 * 8
    chosen = min(options.updates, max(8, updates))
    print(f"final runs of {chosen} updates, {max(speeds):.2f} s each in the sweep", flush=True)
    return chosen


# ------------------------------------------------------------------------------ cells


def run_cell(options: Options) -> None:
    """The cell of this process; its rows are written last, so an interrupted cell is done again."""
    enable_compilation_cache()
    kind, _, name = options.cell.partition(":")
    cells: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "annotator": lambda: train_annotator(options, name),
        "reference": lambda: small_runs.respond(options),
        "sweep": lambda: small_runs.sweep(options, name),
        "final": lambda: small_runs.final(options, name),
        "judge": lambda: small_runs.judged(options),
    }
    rows = cells[kind]()
    if kind == "annotator":
        small_runs.forget(options, name)
    write_rows(options, options.cell, rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
    except UserError as error:
        raise SystemExit(f"small: {error}") from None
