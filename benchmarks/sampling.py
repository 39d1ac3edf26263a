"""Tokens a second of greedy generation, beside `generate` of transformers.

Command:  python -m benchmarks.sampling [--size 15M] [--batches 1 32] [--rounds 3] [--json FILE]
Time:     about five minutes on two CPU cores; before the first, some minutes in which pip fetches
          torch and transformers (nothing else uses the network)
Expect:   one table, and the same tokens from both; on a CPU one row at a time is bound by reading
          the weights once per token

Each way is a process of its own, in turn, round by round: the same folder of random weights, the
same prompts, the same number of new tokens, each with its cache. A first call, which compiles, is
not counted. CPU-seconds are those of all threads.
"""

import json
import random
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

SCRIPT = str(Path(__file__).parent / "peers" / "generate.py")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M", "1B"] = "15M"
    """Parameters of the model."""
    batches: tuple[int, ...] = (1, 32)
    """Rows that are generated together."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 128
    """Tokens that are generated for each."""
    rounds: int = 3
    """How often each way runs."""
    repeats: int = 3
    """Calls on the clock of each run."""
    environments: Path = environments.DEFAULT
    """Where the peers' virtual environments are kept."""
    json: Path | None = None
    """Where to write all that was measured."""


def main(options: Options) -> None:
    """Measure and print."""
    torch = environments.python_of("torch", options.environments)
    pythons = {"jaxalign": sys.executable, "transformers": torch}
    facts, rows = machine(), []
    content: dict[str, Any] = {
        "machine": facts,
        "options": asdict(options) | {"environments": None, "json": None},
    }
    print(f"{options.size}, prompts of {options.prompt}, {options.new} new; {describe(facts)}")
    with tempfile.TemporaryDirectory(prefix="sampling_") as scratch:
        model, _ = inputs.make(Path(scratch), size=options.size, length=8, pairs=1, prompt=0.5)
        for batch in options.batches:
            results = measure(options, pythons, str(model), batch)
            content[f"batch {batch}"] = {
                way: [{k: v for k, v in x.items() if k != "tokens"} for x in runs]
                for way, runs in results.items()
            }
            rows += [line(options, batch, way, results) for way in pythons]
            write_json(options.json, content)
    header = ["way", "batch", "tokens/s", "tokens/CPU-s", "to transformers", "peak MB", "same"]
    print(table(header, rows))


def measure(
    options: Options, pythons: dict[str, str], model: str, batch: int
) -> dict[str, list[dict[str, Any]]]:
    """Each way's runs, round by round."""
    drawn = random.Random(0)
    ids = range(len(inputs.SPECIAL), inputs.VOCABULARY)
    prompts = [drawn.choices(ids, k=options.prompt) for _ in range(batch)]
    job = {"model": model, "prompts": prompts, "new": options.new, "repeats": options.repeats}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in pythons}
    for _ in range(options.rounds):
        for way, python in pythons.items():
            done = run([python, SCRIPT, way, json.dumps(job)], {"HF_HUB_OFFLINE": "1"})
            if done.error or done.recorded is None:
                sys.exit(f"{way}: {done.error}")
            runs[way].append(done.recorded)
    return runs


def line(options: Options, batch: int, way: str, runs: dict[str, list[dict[str, Any]]]) -> list:
    """A row of the table."""
    tokens = batch * options.new

    def rates(name: str, of: str) -> list[float | None]:
        return [tokens / median(x[name]) for x in runs[of]]

    own = [x for x in rates("cpu_seconds", way) if x is not None]
    wall = [x for x in rates("seconds", way) if x is not None]
    ratio = round_ratio(rates("cpu_seconds", way), rates("cpu_seconds", "transformers"))
    same = runs[way][0]["tokens"] == runs["transformers"][0]["tokens"]
    return [
        way,
        batch,
        figure(median(wall), 0),
        figure(median(own), 0),
        figure(ratio),
        figure(max(x["peak_bytes"] for x in runs[way]) / 1e6, 0),
        "same" if same else "NO",
    ]


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
