"""A DPO step of `jaxalign train` beside TRL's, hand-written PyTorch's and tunix's.

Command:  python -m benchmarks.dpo_step [--size 15M] [--length 256] [--pairs 8] [--rounds 3]
          [--peers trl torch torch_response tunix] [--json FILE]
Time:     on two CPU cores with nothing else to do, 15M about eight minutes a round, 110M about
          forty; before the first, some minutes in which pip fetches the peers (nothing else uses
          the network)
Expect:   one table, "same" beside every contestant, and lines that say whether jaxalign makes 4
          times TRL's tokens/s in a quarter of its memory, 1.4 times those of the best PyTorch
          loop, and 1.5 times tunix's: the goals for 15M and 110M on a CPU in float32

Contestants are processes of their own, in turn, round by round: A B C A B C. All read the same
folder of random weights and the same file of pairs, as many as a batch has, so that every step is
the same batch in whatever order: 2 x pairs x length tokens, none of them padding. AdamW without
decay, norm clipped at 1, a constant learning rate, beta 0.1, every step logged.

- jaxalign is the command line with all defaults but a live reference (by default a batch that comes
  again and again has its reference precomputed), metrics from its metrics.jsonl; then with
  `--reference precomputed`, with `--share-prompts never`, with `--remat none`. Its final
  checkpoint is after the last measured step, as TRL and tunix are told to save nothing.
- trl: `gradient_checkpointing=False`, with the live reference and with
  `precompute_ref_log_probs=True`. "trl, checkpointing" is the live reference with
  `gradient_checkpointing=True`, which is the default of TRL 1.16 (as is `bf16=True`; here --dtype
  decides).
- torch: a loop with the logits of all tokens; torch_response: one with the logits of the response.
- tunix: its DPOTrainer; it has no precomputed reference. In bfloat16 its parameters are bfloat16,
  the others' float32 with bfloat16 products.

The end-of-sequence token is each response's last: jaxalign and TRL append it themselves, the torch
loops and tunix are given it. Nobody adds a beginning token.

Seconds of a step: the median of its round without the first `--skip` steps (compilation, warm-up).
Ratios are taken within a round, and their median is shown. Memory: the largest resident set until
the last step, over all rounds; on a GPU, what the framework's allocator had at most in use. Time to
the first step: from the start of the process until a first step is finished, in the first round
(jaxalign and tunix then compile; from the second round on their programs come from JAX's cache on
disk). "same" compares with jaxalign: the token ids of the batch; the mean log-probs of chosen and
rejected before the first update (relative, to 1e-5 in float32 and 1e-3 in bfloat16); and how far
the loss is below log 2 at the last step, which the gradients and the optimiser decide (to 2 per
cent; in bfloat16 to half, as it rounds log-probs more coarsely than a few steps move them).
"""

import json
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import environments, inputs
from benchmarks.machine import (
    describe,
    figure,
    gpu,
    machine,
    median,
    memory,
    round_ratio,
    run,
    table,
    write_json,
)

PEERS = Path(__file__).parent / "peers"
TOLERANCE = {"float32": (1e-5, 0.02), "bfloat16": (1e-3, 0.5)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M", "1B"] = "15M"
    """Parameters of the model, with its 32,000 tokens tied; 1B is meant for a GPU."""
    length: int = 256
    """Tokens of prompt and response together."""
    prompt: float = 0.5
    """Share of them that is prompt, the same for both responses."""
    pairs: int = 8
    """Pairs in a batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    rounds: int = 3
    """How often each contestant runs."""
    steps: int = 6
    """Steps of a run."""
    skip: int = 2
    """First steps of a run that are not counted."""
    learning_rate: float = 1e-6
    """Of AdamW, constant; some steps of it leave losses that tell a wrong gradient."""
    peers: tuple[Literal["trl", "torch", "torch_response", "tunix"], ...] = (
        "trl",
        "torch",
        "torch_response",
        "tunix",
    )
    """Whom jaxalign is compared with."""
    trainer_flags: str = ""
    """More flags for every `jaxalign train`."""
    environments: Path = environments.DEFAULT
    """Where the peers' virtual environments are kept."""
    json: Path | None = None
    """Where to write all that was measured."""


@dataclass(frozen=True)
class Contestant:
    """A row of the table."""

    name: str
    script: str
    environment: str | None
    """None: the one that runs the benchmark."""
    job: Mapping[str, Any]
    live_reference: bool = True


def contestants(options: Options) -> list[Contestant]:
    """In the order in which they run."""
    flags = ["--reference", "live", *shlex.split(options.trainer_flags)]
    precomputed = ["--reference", "precomputed"]
    rows = [
        Contestant("jaxalign", "jaxalign_trainer", None, {"flags": flags}),
        Contestant(
            "jaxalign, precomputed",
            "jaxalign_trainer",
            None,
            {"flags": flags + precomputed},
            live_reference=False,
        ),
    ]
    rows += [
        Contestant(f"jaxalign, {name}", "jaxalign_trainer", None, {"flags": flags + more})
        for name, more in (
            ("prompts twice", ["--share-prompts", "never"]),
            ("remat none", ["--remat", "none"]),
        )
    ]
    trl = {"checkpointing": False, "precomputed": False}
    theirs = {
        "trl": [
            Contestant("trl", "trl_trainer", "torch", trl),
            Contestant(
                "trl, precomputed",
                "trl_trainer",
                "torch",
                trl | {"precomputed": True},
                live_reference=False,
            ),
            Contestant("trl, checkpointing", "trl_trainer", "torch", trl | {"checkpointing": True}),
        ],
        "torch": [Contestant("torch", "torch_loop", "torch", {"way": "full"})],
        "torch_response": [
            Contestant("torch_response", "torch_loop", "torch", {"way": "response"})
        ],
        "tunix": [Contestant("tunix", "tunix_trainer", "tunix", {})],
    }
    return rows + [row for peer in options.peers for row in theirs[peer]]


def main(options: Options) -> None:
    """Measure and print."""
    if not 0 <= options.skip < options.steps:
        sys.exit(f"--skip {options.skip}: leaves none of {options.steps} steps to count")
    refuse_if_too_large(options)
    rows = contestants(options)
    names = {row.environment for row in rows if row.environment}
    pythons: dict[str | None, str] = {None: sys.executable}
    pythons |= {name: environments.python_of(name, options.environments) for name in sorted(names)}
    facts = machine()
    shape = inputs.SHAPES[options.size]
    print(
        f"{options.size}, {options.pairs} pairs of 2 x {options.length} tokens, {options.dtype}; "
        f"{describe(facts)}"
    )
    runs: dict[str, list[dict[str, Any] | None]] = {row.name: [] for row in rows}
    result = {
        "machine": facts,
        "options": asdict(options) | {"environments": None, "json": None},
        "shape": asdict(shape),
        "runs": runs,
    }
    with tempfile.TemporaryDirectory(prefix="dpo_step_") as scratch:
        folder = Path(scratch)
        model, pairs = inputs.make(
            folder,
            size=options.size,
            length=options.length,
            pairs=options.pairs,
            prompt=options.prompt,
        )
        for number in range(options.rounds):
            for at, row in enumerate(rows):
                output = folder / f"output_{number}_{at}"
                output.mkdir()
                job = {
                    "model": str(model),
                    "pairs_file": str(pairs),
                    "output": str(output),
                    "length": options.length,
                    "pairs": options.pairs,
                    "dtype": options.dtype,
                    "steps": options.steps,
                    "learning_rate": options.learning_rate,
                    "beta": 0.1,
                }
                job |= row.job
                script = str(PEERS / f"{row.script}.py")
                cache = {
                    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled" / str(at)),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
                    "HF_HUB_OFFLINE": "1",
                }
                done = run([pythons[row.environment], script, json.dumps(job)], cache)
                recorded = None if done.error else done.recorded
                said = done.error
                if recorded is not None:
                    recorded["process_seconds"] = done.seconds
                    said = f"{step_seconds(recorded, options.skip):.3f} seconds a step"
                runs[row.name].append(recorded)
                print(f"round {number + 1}: {row.name}: {said}", file=sys.stderr)
                write_json(options.json, result)
    report = summary(options, rows, runs, facts["gpu"])
    result |= {"summary": report, "goals": goals(report)}
    write_json(options.json, result)
    show(options, report)


def refuse_if_too_large(options: Options) -> None:
    """On a CPU: say what the hungriest contestant needs, and stop if the machine has it not."""
    if gpu():
        return
    needed, there = memory_needed(options) / 2**30, memory("MemAvailable") / 2**30
    if needed > there:
        sys.exit(
            f"--size {options.size} with {options.pairs} pairs of 2 x {options.length} tokens "
            f"needs about {needed:.0f} GiB for the largest contestant, and {there:.0f} GiB are "
            "free: use a GPU, a smaller size or fewer pairs"
        )


def memory_needed(options: Options) -> int:
    """About the bytes of a float32 step with all logits and all activations kept.

    Weights, reference, gradients and two moments; eight arrays of logits (TRL's log-probs and their
    gradients); some thirty arrays of a layer's width and six of its MLP's per token; a GiB for the
    libraries.
    """
    shape = inputs.SHAPES[options.size]
    tokens = 2 * options.pairs * options.length
    kept = shape.layers * (30 * shape.width + 6 * shape.mlp_width)
    return 2**30 + 4 * (5 * shape.matrix_parameters + tokens * (8 * inputs.VOCABULARY + kept))


def step_seconds(recorded: Mapping[str, Any], skip: int) -> float:
    """Median seconds of the steps that count."""
    return median(recorded["seconds"][skip:])


def peak(recorded: Mapping[str, Any], on_gpu: bool) -> int:
    """Largest memory until the last step."""
    return max(recorded["device_peak_bytes" if on_gpu else "peak_bytes"])


def summary(
    options: Options,
    rows: Sequence[Contestant],
    runs: Mapping[str, Sequence[dict[str, Any] | None]],
    gpu_name: str | None,
) -> dict[str, dict[str, Any]]:
    """What the table shows, by contestant; a run that failed is left out, and said."""
    tokens = 2 * options.pairs * options.length
    rate, space = {}, {}
    for name, results in runs.items():
        rate[name] = [tokens / step_seconds(x, options.skip) if x else None for x in results]
        spaces = [peak(x, gpu_name is not None) for x in results if x]
        space[name] = max(spaces) if spaces else None
    report = {}
    for row in rows:
        good = [x for x in runs[row.name] if x]
        if not good:
            report[row.name] = {"same": "failed"}
            continue
        rates = [x for x in rate[row.name] if x is not None]
        report[row.name] = {
            "tokens_per_second": median(rates),
            "times": {base: round_ratio(rate[row.name], rate[base]) for base in runs},
            "cpu_seconds": median([median(x["cpu_seconds"][options.skip :]) for x in good]),
            "peak_bytes": space[row.name],
            "memory": {base: space[row.name] / space[base] for base in runs if space[base]},
            "first_step": good[0]["first_step"],
            "first_step_warm": median([x["first_step"] for x in good[1:]]) if good[1:] else None,
            "mfu": utilisation(options, row, median(rates), gpu_name),
            "same": same(good[0], runs["jaxalign"], options.dtype),
        }
    return report


def utilisation(
    options: Options, row: Contestant, rate: float, gpu_name: str | None
) -> float | None:
    """Model FLOP utilisation (jaxalign.training.throughput), where the data sheet's peak is known.

    Model FLOPs are counted alike for all, whatever a contestant saves by its own wits.
    """
    if gpu_name is None or options.dtype != "bfloat16":
        return None
    from jaxalign.training.throughput import PEAK_BFLOAT16

    flops = (8 if row.live_reference else 6) * inputs.SHAPES[options.size].matrix_parameters
    known = PEAK_BFLOAT16.get(gpu_name)
    return rate * flops / known if known else None


def same(own: Mapping[str, Any], ours: Sequence[Mapping[str, Any] | None], dtype: str) -> str:
    """Whether a contestant computed what jaxalign did; if not, what differs."""
    base = next((x for x in ours if x), None)
    if base is None:
        return "no jaxalign run"
    if own["tokens"] != base["tokens"]:
        return "NO: other tokens"
    if len(own["losses"]) != len(base["losses"]):
        return f"NO: {len(own['losses'])} steps"
    apart = [abs(a / b - 1) for a, b in zip(own["log_probs"], base["log_probs"], strict=True)]
    fall, expected = (math.log(2) - x["losses"][-1] for x in (own, base))
    for what, difference, tolerance in zip(
        ("log-probs", "fall of the loss"),
        (max(apart), abs(fall / expected - 1)),
        TOLERANCE[dtype],
        strict=True,
    ):
        if not difference <= tolerance:
            return f"NO: {what} {difference:.0e}"
    return "same"


def goals(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The claims, with what was measured of them."""
    lines = []

    def line(name: str, what: str, base: str, bound: float, *, most: bool = False) -> None:
        value = report.get(name, {}).get(what, {}).get(base)
        if value is not None:
            met = value <= bound if most else value >= bound
            lines.append(
                f"{name}: {'peak memory' if most else 'tokens/s'} {value:.2f} of {base}'s, "
                f"{'at most' if most else 'at least'} {bound}: {'met' if met else 'NOT met'}"
            )

    for name in ("jaxalign", "jaxalign, prompts twice"):
        times = report.get(name, {}).get("times", {})
        loops = [loop for loop in ("torch", "torch_response") if times.get(loop)]
        line(name, "times", "trl", 4.0)
        line(name, "memory", "trl", 0.25, most=True)
        if loops:
            line(name, "times", min(loops, key=lambda loop: times[loop]), 1.4)
        line(name, "times", "tunix", 1.5)
    line("jaxalign, precomputed", "times", "trl, precomputed", 4.0)
    line("jaxalign, precomputed", "memory", "trl, precomputed", 0.25, most=True)
    return lines


def show(options: Options, report: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table and the goals."""
    base = "trl" if "trl" in options.peers else "jaxalign"
    header = ["contestant", "tokens/s", f"to {base}", "CPU-s a step", "memory MB", f"to {base}"]
    header += ["first step s", "cached s", "MFU", "same"]
    rows = []
    for name, own in report.items():
        if "times" not in own:
            rows.append([name, *[None] * 8, own["same"]])
            continue
        rows.append(
            [
                name,
                figure(own["tokens_per_second"], 0),
                figure(own["times"].get(base)),
                figure(own["cpu_seconds"]),
                figure(own["peak_bytes"] / 1e6, 0),
                figure(own["memory"].get(base)),
                figure(own["first_step"], 1),
                figure(own["first_step_warm"], 1),
                figure(own["mfu"]),
                own["same"],
            ]
        )
    print(table(header, rows))
    for line in goals(report):
        print(line)


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
