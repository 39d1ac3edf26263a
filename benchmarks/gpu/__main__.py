"""DPO, SFT and sampling of a 1B model on one GPU, after a check that the GPU computes correctly.

Command:  python -m benchmarks.gpu --minutes 8 [--output FOLDER] [--peer-python PYTHON]
Time:     the minutes that it is given; all parts take about 12 on an H100, 6 without peers; the
          same command again with the same folder measures what is missing
Expect:   first whether all checks passed, then a line for each part, at the end a Markdown table

It installs nothing: jaxalign needs jax with CUDA, flax, optax, jaxtyping, scipy, grain and
tyro for it.
The peers run in a process of their own, in the interpreter that `--peer-python` names: TRL's
trainers with their fused heads, PyTorch loops with `torch.compile`, and `generate` of transformers.
What they lack is said in the table.

The checks compare a tiny model's log-probs, losses, gradients, per-pair Gram matrices and tokens
with float32 values of a CPU (`reference.json`): float32 to 1e-4, bfloat16 to 0.02, or 0.1 for
single tokens and directions of gradients. If one fails, the results are marked as not valid and
the exit status is 1.

Each part is a process of its own and starts only if its estimated cost fits the remaining minutes;
one that takes a minute longer than these is stopped. Results are written as they come
(`results.jsonl`). A later call tries a part that failed once more, after those that are missing.

A step is timed until its results are there; the median is shown, without the steps that warm up.
Tokens are those of both responses with their prompts, without padding. MFU is model FLOPs a second
over the data sheet's dense bfloat16 peak. Per token 6 N for the policy's forward and backward pass
and 2 N for the reference (4 N and 2 N with adapters), N the parameters that multiply the token,
those of the head at scored positions alone; and attention's products, of which causality leaves
half. Nothing that is recomputed counts. Memory is the allocator's peak until the last step.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.gpu import parts
from benchmarks.gpu.results import Results, read, report, validity
from benchmarks.gpu.sizes import SIZES
from benchmarks.machine import gpu, machine
from benchmarks.peers.recorder import MARK
from jaxalign.errors import UserError

GRACE = 60
"""Seconds after the last minute in which a part may still finish."""
CHECK_SECONDS = 240
"""Longest time of the checks, which run whatever the minutes."""

Measure = Callable[[str, str, Path, float], parts.Outcome]
"""(part, size, scratch folder, longest seconds) -> what became of a part of jaxalign."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    minutes: float = 8.0
    """Time in which parts are started."""
    output: Path = Path("gpu_results")
    """Folder of `results.jsonl`; one with results of an earlier call is completed."""
    scratch: Path | None = None
    """Folder of the peers' weights (5 GB) and of compiled programs, for later calls on the same
    machine; None: a temporary one."""
    peer_python: str | None = None
    """Python interpreter with torch, transformers and trl; None: no peers."""
    size: Literal["1B", "tiny"] = "1B"
    """1B for a card; tiny rehearses the command on a CPU."""
    table: bool = False
    """Print the table of the results in the folder, and measure nothing."""
    write_reference: bool = False
    """Compute the values of the checks on this CPU, and store them."""
    part: str | None = None
    """Measure this part alone in this process, and print its result as JSON."""


def main(options: Options, measure: Measure = parts.measured_in_process) -> int:
    """Measure and print.

    Args:
      options: of the command.
      measure: runs a part of jaxalign.

    Returns:
      The exit status: 1 if a check failed.
    """
    if options.write_reference:
        from benchmarks.gpu import checks

        checks.write_reference()
        return 0
    if options.part is not None:
        print(MARK + json.dumps(parts.measured_here(options.part, SIZES[options.size])))
        return 0
    try:
        if options.table:
            lines = read(options.output)
        elif options.scratch is not None:
            lines = measured(options, options.scratch, measure)
        else:
            with tempfile.TemporaryDirectory(prefix="benchmarks_gpu_") as scratch:
                lines = measured(options, Path(scratch), measure)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    needs = {True: "not measured: needs --peer-python", False: "not measured yet"}
    print(report(lines, {part.name: needs[part.peer is not None] for part in parts.PARTS}))
    by_name = {line["part"]: line for line in lines}
    return int(validity(by_name.get(parts.CHECKS))[0].startswith("NOT VALID"))


def measured(options: Options, scratch: Path, measure: Measure) -> list[dict[str, Any]]:
    """The lines of the results, after whatever fits the minutes.

    Args:
      options: of the command.
      scratch: folder of weights and compiled programs.
      measure: runs a part of jaxalign.

    Raises:
      UserError: the output folder has results of another size or card, or there is no such
        interpreter.
    """
    if options.peer_python is not None and shutil.which(options.peer_python) is None:
        raise UserError(f"--peer-python: {options.peer_python} is not a program; name a python")
    deadline = time.monotonic() + 60 * options.minutes
    facts = machine() | {"driver": gpu("driver_version"), "size": options.size}
    results = Results(options.output, facts)
    scratch.mkdir(parents=True, exist_ok=True)
    check(options.size, results, scratch, measure)
    for part in sorted(parts.PARTS, key=lambda part: results.failed(part.name)):
        base = (results.result(part.base) or {}) if part.base else {}
        if results.result(part.name) is not None:
            continue
        if part.peer is not None and options.peer_python is None:
            say(f"{part.name}: left out: no --peer-python")
            continue
        remaining = deadline - time.monotonic()
        needed = parts.estimate(part, options.size, scratch)
        if needed > remaining:
            say(f"{part.name}: left out: needs about {needed:.0f} s of {max(remaining, 0):.0f} s")
            continue
        start = time.monotonic()
        if part.peer is None:
            outcome = measure(part.name, options.size, scratch, remaining + GRACE)
        else:
            outcome = parts.measured_by_peer(
                part,
                str(options.peer_python),
                SIZES[options.size],
                scratch,
                remaining + GRACE,
                next(iter(base.values()), {}),
            )
        record(results, part.name, time.monotonic() - start, outcome)
    return results.lines


def check(size: str, results: Results, scratch: Path, measure: Measure) -> None:
    """Check the device, unless an earlier call has found it correct; say what came out."""
    line = next((x for x in results.lines if x["part"] == parts.CHECKS), None)
    if line is None or validity(line)[0].startswith("NOT VALID"):
        start = time.monotonic()
        outcome = measure(parts.CHECKS, size, scratch, CHECK_SECONDS)
        record(results, parts.CHECKS, time.monotonic() - start, outcome)
        line = results.lines[-1]
    say("\n".join(validity(line)))


def record(results: Results, name: str, seconds: float, outcome: parts.Outcome) -> None:
    """Write and say what became of a part."""
    if outcome.error is not None:
        results.add(name, seconds, error=outcome.error)
        say(f"{name}: failed after {seconds:.0f} s: {outcome.error}")
        return
    results.add(name, seconds, result=outcome.result)
    say(f"{name}: measured in {seconds:.0f} s")


def say(text: str) -> None:
    """A line about progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")], description=__doc__)))
