"""Loading a Hugging Face folder: seconds and memory beside transformers and safetensors alone.

Command:  python -m benchmarks.loading [--size 110M] [--rounds 5] [--json FILE]
Time:     about two minutes on two CPU cores; before the first, some minutes in which pip fetches
          the peers (nothing else uses the network)
Expect:   one table; jaxalign's peak is its imports and the model once

Each load is a process of its own, in turn, round by round, on the CPU in float32. The clock starts
after the imports and stops when every parameter has been read once (a memory map that nobody read
is not loaded); the sum of all squares must be the same for all. "before" is the process's peak
memory when the clock starts, "added" what loading put on top, "to file" that over the file's size.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import environments, inputs
from benchmarks.machine import (
    describe,
    figure,
    machine,
    median,
    round_ratio,
    run,
    table,
    write_json,
)

SCRIPT = str(Path(__file__).parent / "peers" / "load_weights.py")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M", "1B"] = "110M"
    """Parameters of the model."""
    rounds: int = 5
    """How often each way runs, after once to warm the disk's cache."""
    environments: Path = environments.DEFAULT
    """Where the peers' virtual environments are kept."""
    json: Path | None = None
    """Where to write all that was measured."""


def main(options: Options) -> None:
    """Measure and print."""
    torch = environments.python_of("torch", options.environments)
    pythons = {"jaxalign": sys.executable, "torch": torch, "safetensors": sys.executable}
    facts = machine()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in pythons}
    with tempfile.TemporaryDirectory(prefix="loading_") as scratch:
        model, _ = inputs.make(Path(scratch), size=options.size, length=8, pairs=1, prompt=0.5)
        file_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        for number in range(options.rounds + 1):
            for way, python in pythons.items():
                done = run([python, SCRIPT, way, str(model)], {"JAX_PLATFORMS": "cpu"})
                if done.error or done.recorded is None:
                    sys.exit(f"{way}: {done.error}")
                if number:
                    runs[way].append(done.recorded)
    squares = {way: results[0]["squares"] for way, results in runs.items()}
    first = squares["safetensors"]
    assert all(abs(x / first - 1) < 1e-5 for x in squares.values()), f"other weights: {squares}"
    seconds = {way: [x["seconds"] for x in results] for way, results in runs.items()}
    print(f"{options.size}, {file_bytes / 1e6:,.0f} MB; {describe(facts)}")
    rows = []
    for way, results in runs.items():
        before = median([x["before_bytes"] for x in results])
        peak = median([x["peak_bytes"] for x in results])
        rows.append(
            [
                way,
                figure(median(seconds[way]), 3),
                figure(round_ratio(seconds[way], seconds["torch"])),
                figure(before / 1e6, 0),
                figure((peak - before) / 1e6, 0),
                figure((peak - before) / file_bytes),
                figure(peak / 1e6, 0),
            ]
        )
    header = ["way", "seconds", "to torch", "before MB", "added MB", "to file", "peak MB"]
    print(table(header, rows))
    write_json(
        options.json,
        {
            "machine": facts,
            "options": asdict(options) | {"environments": None, "json": None},
            "file_bytes": file_bytes,
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
