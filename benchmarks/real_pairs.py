"""DPO of a real model on real pairs of unlike lengths: `jaxalign train` beside TRL's DPOTrainer.

Command:  python -m benchmarks.real_pairs --model FOLDER --data pairs.jsonl [--dtypes float32]
          [--orders packed padded] [--batch-size 8] [--steps 14] [--rounds 1]
          [--remat auto none full] [--json FILE]
Time:     for a model of 135 million parameters about two minutes a contestant and round on two
          CPU cores with nothing else to do; before the first, some minutes in which pip fetches TRL
Expect:   one table, and the largest difference of the two loss curves

Each contestant is a process of its own, with its own reading, collation and padding, and all of its
defaults but these: AdamW without decay at a constant 1e-6, norm clipped at 1, beta 0.1, every step
logged, nothing held out, one checkpoint (weights and optimiser) after the last step, a reference
that runs in each step. TRL does not checkpoint gradients, which is faster; its head is fused, as
always since 1.16. Plain prompts are plain in both (`--chat never`).

Both see the same pairs in the same batches: jaxalign's order of data is a pure function of its
seed, and TRL reads a file that is written in that order, without shuffling. There are two orders:
jaxalign packs batches of equal size (packed), or pads batches of pairs of like length (padded);
TRL pads both. Tokens are those of prompts and responses, without padding.

Seconds and CPU-seconds: the median over a run's steps without the first `--skip`, which compile.
Rates: of all these steps together, with shapes that are compiled later. Whole: from the start of
the process to its end. Memory: the largest resident set until the last step. "jaxalign, again" is
the same command a second time, with the programs of the first in JAX's cache on disk: what every
later run of a researcher is.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks import environments
from benchmarks.machine import describe, figure, machine, median, run, table, write_json
from jaxalign.data import load_tokenizer, pair_batches, preference_records, tokenize_pairs
from jaxalign.data.packing import Packing, packed_batches

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model: str
    """Hugging Face folder, which both contestants open."""
    data: str
    """File of preference pairs."""
    records: int = 200
    """Number of pairs, counted from the first."""
    batch_size: int = 8
    """Number of pairs in a batch."""
    max_length: int = 512
    """Largest number of tokens in a row."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Data types of the computation."""
    orders: tuple[Literal["packed", "padded"], ...] = ("packed", "padded")
    """Batches: packed pairs of equal size, or padded pairs of like length."""
    remat: tuple[Literal["auto", "none", "dots", "full"], ...] = ("auto",)
    """What jaxalign's backward pass recomputes, one contestant each."""
    steps: int = 14
    """Number of steps in a run."""
    skip: int = 4
    """Number of first steps that are not counted."""
    rounds: int = 1
    """Number of runs of each contestant."""
    environments: Path = environments.DEFAULT
    """Where TRL's virtual environment is kept."""
    json: Path | None = None
    """Where to write all that was measured."""


def main(options: Options) -> None:
    """Measure and print."""
    if not 0 <= options.skip < options.steps:
        sys.exit(f"--skip {options.skip}: leaves none of {options.steps} steps to count")
    torch = environments.python_of("torch", options.environments)
    contestants: list[tuple[str, str, list[str]]] = []
    for order in options.orders:
        for remat in options.remat:
            name = f"jaxalign {order}" if remat == "auto" else f"jaxalign {order} {remat}"
            flags = ["--remat", remat, "--packing", "always" if order == "packed" else "never"]
            contestants += [(name, order, flags), (f"{name} again", order, flags)]
        contestants += [(f"trl {order}", order, [])]
    facts = machine()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="real_pairs_") as scratch:
        folder = Path(scratch)
        tokens = write_pairs(options, folder)
        print(f"{options.records} pairs of {options.data}, {describe(facts)}")
        for number in range(options.rounds):
            for dtype in options.dtypes:
                for name, order, flags in contestants:
                    cache = folder / f"cache_{name.removesuffix(' again')}_{dtype}_{number}"
                    done = run(
                        [
                            sys.executable if flags else torch,
                            *command(options, name, order, flags, dtype, folder, number),
                        ],
                        {"HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)},
                    )
                    if done.recorded is None or done.error:
                        sys.exit(f"{name}, {dtype}: {done.error}")
                    recorded = done.recorded | {"process_seconds": done.seconds, "order": order}
                    runs.setdefault(f"{name}, {dtype}", []).append(recorded)
                    seconds = median(recorded["seconds"][options.skip :])
                    print(f"{name}, {dtype}: {seconds:.2f} seconds a step", file=sys.stderr)
                    write_json(
                        options.json,
                        {
                            "machine": facts,
                            "options": asdict(options) | {"environments": None, "json": None},
                            "tokens": tokens,
                            "runs": runs,
                        },
                    )
    show(options, runs, tokens)


def write_pairs(options: Options, folder: Path) -> dict[str, list[int]]:
    """Write `pairs.jsonl`, and the pairs of each order as jaxalign's batches have them.

    Returns:
      The tokens of each step's batch, without padding, by order.
    """
    records = list(islice(preference_records(options.data), options.records))
    pairs, report = tokenize_pairs(
        records, load_tokenizer(options.model), max_length=options.max_length, chat="never"
    )
    if report.identical or report.truncated_responses or report.truncated_prompts:
        sys.exit(f"{options.data}: {report.summary()}; name pairs that fit whole")
    made = {
        "packed": packed_batches(pairs, Packing(), batch_size=options.batch_size),
        "padded": pair_batches(pairs, batch_size=options.batch_size),
    }
    files = {"pairs": list(range(len(records)))}
    tokens: dict[str, list[int]] = {}
    for name in options.orders:
        batches = list(islice(made[name], options.steps))
        files[name] = [number for batch in batches for number in batch.record_index.tolist()]
        tokens[name] = [int(np.sum(x.prompt_length + x.response_length)) for x in batches]
    for name, numbers in files.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in numbers:
                record = records[number]
                row = {key: getattr(record, key) for key in ("prompt", "chosen", "rejected")}
                file.write(json.dumps(row) + "\n")
    return tokens


def command(
    options: Options,
    name: str,
    order: str,
    flags: list[str],
    dtype: str,
    folder: Path,
    number: int,
) -> list[str]:
    """Script and job of a contestant."""
    output = folder / f"{name.replace(' ', '_')}_{dtype}_{number}"
    output.mkdir()
    job: dict[str, Any] = {
        "model": options.model,
        "output": str(output),
        "length": options.max_length,
        "pairs": options.batch_size,
        "dtype": dtype,
        "steps": options.steps,
        "learning_rate": 1e-6,
        "beta": 0.1,
    }
    if flags:
        job |= {"pairs_file": str(folder / "pairs.jsonl")}
        job |= {"flags": ["--chat", "never", "--reference", "live", *flags]}
        return [str(PEERS / "jaxalign_trainer.py"), json.dumps(job)]
    job |= {"pairs_file": str(folder / f"{order}.jsonl"), "shuffle": False}
    job |= {"checkpointing": False, "precomputed": False, "save": True}
    return [str(PEERS / "trl_trainer.py"), json.dumps(job)]


def show(
    options: Options, runs: dict[str, list[dict[str, Any]]], tokens: dict[str, list[int]]
) -> None:
    """The table, and how far the loss curves are apart."""
    counted = slice(options.skip, None)
    rows = []
    for name, results in runs.items():
        order, dtype = results[0]["order"], name.split(", ")[1]
        base = runs[f"trl {order}, {dtype}"]
        ratios = [sum(x["seconds"][counted]) for x in base]
        ratios = [b / sum(x["seconds"][counted]) for b, x in zip(ratios, results, strict=True)]
        seconds = [median(x["seconds"][counted]) for x in results]
        whole = [x["process_seconds"] for x in results]
        rate = [sum(tokens[order][counted]) / sum(x["seconds"][counted]) for x in results]
        per_cpu = [sum(tokens[order][counted]) / sum(x["cpu_seconds"][counted]) for x in results]
        rows.append(
            [
                name,
                figure(median(seconds)),
                figure(median([median(x["cpu_seconds"][counted]) for x in results])),
                figure(median(rate), 0),
                figure(median(per_cpu), 0),
                figure(median(ratios)),
                figure(median([x["first_step"] for x in results]), 1),
                figure(median(whole), 1),
                figure(
                    median([b["process_seconds"] / a for a, b in zip(whole, base, strict=True)])
                ),
                figure(max(max(x["peak_bytes"]) for x in results) / 1e9),
            ]
        )
    header = ["", "seconds", "CPU-seconds", "tokens/s", "tokens/CPU-s", "TRL's seconds / own"]
    header += ["first step at", "whole", "TRL's whole / own", "peak GB"]
    print(table(header, rows))
    for dtype in options.dtypes:
        for order in options.orders:
            mine = [x for x in runs if x.startswith("jaxalign") and x.endswith(f", {dtype}")]
            first = next(x for x in mine if runs[x][0]["order"] == order)
            ours = np.array(runs[first][0]["losses"])
            trl = np.array(runs[f"trl {order}, {dtype}"][0]["losses"])
            print(
                f"{order}, {dtype}: losses differ by at most {np.abs(ours - trl).max():.1e} "
                f"while they fall by {ours[0] - ours[-1]:.1e}"
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
