"""The paper's comparison on a real chat model: eight online methods, a sweep, all against all.

Command:  python -m experiments.ipo_md.small --model FOLDER [--processes 8] [--minutes 6]
Time:     minutes on an accelerator, a day on two CPU cores; what is finished is not done again
Expect:   the sections "small ..." of this folder's README, small.png, small_reliability.png

The policy is a chat model of 135M parameters with LoRA adapters. A reward model and a preference
model of its size learn from half of the pairs of `small_data.py`, a judge from the other half with
another seed; no policy learns from the judge. Each method's strength is chosen by the win rate over
the reference in the eyes of its own annotator; then three seeds of each write responses to test
prompts, which are judged all against all. The runs of a method advance together (`together.py`).

The work is done in cells: an annotator, a method's sweep, a method's runs; `--processes` of them
run at a time. Rows of numbers and the responses to the test prompts are kept in `--rows`, so any
other judge can read them later.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.gradient_entanglement.runs import finished
from experiments.ipo_md import small_data, small_tables
from experiments.ipo_md.together import Method, Runs, annotations, order
from jaxalign.backends.local import end_tokens
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.data import load_tokenizer
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.evaluation.reward_models import PreferenceModel, RewardModel
from jaxalign.files import write_json, write_json_lines
from jaxalign.models import load_pretrained
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.differentiation import forward_mode
from jaxalign.online import PromptBatch
from jaxalign.online.sampler import Sampled
from jaxalign.training.calibration import reliability

SEEDS = (0, 1, 2)
BETA = 0.125  # of IPO-MD and Nash-MD-PG: the paper's choice
CONTRASTIVE, GRADIENT = 5e-4, 2.5e-4
"""Learning rates of adapters: of losses on pairs, and of policy gradients, which are noisier."""


def _method(
    name: str, parameter: str, rate: float, prompts: int = 16, **options: float
) -> tuple[Method, int]:
    return Method(name=name, parameter=parameter, options=options, rate=rate), prompts


METHODS: dict[str, tuple[Method, int]] = {
    "ipo_md": _method("ipo_md", "tau", CONTRASTIVE, beta=BETA),
    "online_ipo": _method("online_ipo", "tau", CONTRASTIVE),
    "online_dpo": _method("online_dpo", "beta", CONTRASTIVE),
    "nash_md_pg": _method("nash_md_pg", "tau", GRADIENT, beta=BETA),
    "online_slic": _method("online_slic", "beta", CONTRASTIVE),
    "regularised_policy_gradient": _method(
        "regularised_policy_gradient", "tau", GRADIENT, samples=2
    ),
    "grpo": _method("grpo", "beta", GRADIENT, prompts=8, samples=4),
    "egpo": _method("egpo", "tau", CONTRASTIVE),
}
"""Algorithm -> what its runs share, and the prompts of an update (32 responses learn in each)."""
STRENGTHS: dict[str, tuple[float, float, float]] = {
    "ipo_md": (0.01, 0.1, 1.0),
    "online_ipo": (0.01, 0.1, 1.0),
    "online_dpo": (0.01, 0.1, 1.0),
    "nash_md_pg": (0.001, 0.01, 0.1),
    "online_slic": (0.03, 0.3, 3.0),
    "regularised_policy_gradient": (0.002, 0.02, 0.2),
    "grpo": (0.004, 0.04, 0.4),
    "egpo": (0.01, 0.1, 1.0),
}
"""The strengths tried, ten times apart."""
ORDER = ("annotators", "sweep", "final", "judge")
"""The steps."""
REWARDED = ("regularised_policy_gradient", "grpo")
ANNOTATORS = {
    "reward": ("reward", "bradley_terry", "annotators", 0),
    "preference": ("preference", "preference_model", "annotators", 0),
    "judge": ("preference", "preference_model", "judge", 1),
}
"""Name -> kind of model, loss, file of pairs, seed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained, and how much of it."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder, Hub name or GGUF file of the chat model."""
    folder: str = "runs/ipo_md_small"
    """Folder of data, annotators and compiled programs."""
    rows: str = "experiments/ipo_md/rows"
    """Folder of the numbers and of the responses to the test prompts."""
    processes: int = 1
    """Number of cells at a time, each in a process of its own; 1: all in this process."""
    minutes: float = 0.0
    """Time for everything: the final runs are shortened to fit, and no cell begins later; 0: no
    limit."""
    memory: float = 0.8
    """Fraction of an accelerator's memory for all processes together."""
    step: str = "all"
    """Last step to do: annotators, sweep, final, judge, or all, which also writes the README."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Algorithms."""
    epochs: float = 3.0
    """Passes of each annotator over its pairs."""
    annotator_rate: float = 5e-5
    """Learning rate of the annotators."""
    sweep_updates: int = 20
    """Updates of the runs that choose the strength."""
    updates: int = 48
    """Updates of the final runs, at most; a multiple of 8."""
    longest: int = 96
    """Most tokens of a prompt, chat template included."""
    tokens: int = 64
    """Most tokens of a response."""
    validation: int = 64
    """Number of prompts that choose the strength."""
    test: int = 96
    """Number of test prompts."""
    rate: float = 1.0
    """Factor on all learning rates of policies."""
    cell: str = ""
    """The one cell of this process, e.g. sweep:ipo_md; set by the command itself."""

    @property
    def world(self) -> dict[str, Any]:
        """The options that change the numbers of a run, apart from the number of its updates."""
        names = ("epochs", "annotator_rate", "longest", "tokens", "validation", "test", "rate")
        return {"model": Path(self.model).name} | {name: getattr(self, name) for name in names}


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
    Path(options.rows).mkdir(parents=True, exist_ok=True)
    prepare(options)
    for name in [name for name in ORDER if name in steps]:
        if name == "final":
            options = dataclasses.replace(options, updates=affordable(options, end - time.time()))
        pool(options, [x for x in steps[name] if not is_done(options, x)], end)
        print(f"{name}: ended after {time.time() - started:.0f} s", flush=True)
        if options.step == name:
            return None
    print(small_tables.write(Path(options.rows), Path(__file__).parent))
    return None


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
    speeds = [row["seconds_per_update"] for row in found(options, "sweep")]
    if seconds == float("inf") or not speeds:
        return options.updates
    waves = -(-len(options.methods) // options.processes)
    # a process takes half a minute to begin, the judge another; a third of the time is evaluation
    free = (seconds - 30) / waves - 30
    updates = int(free / (1.5 * max(speeds))) // 8 * 8
    chosen = min(options.updates, max(8, updates))
    print(f"final runs of {chosen} updates, {max(speeds):.2f} s each in the sweep", flush=True)
    return chosen


# ------------------------------------------------------------------------------ rows


def path_of(options: Options, cell: str) -> Path:
    """The file of a cell's rows."""
    return Path(options.rows) / f"{cell.strip(':').replace(':', '_')}.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found(options: Options, kind: str) -> list[dict[str, Any]]:
    """The rows of all methods' cells of a kind."""
    return [row for name in options.methods for row in read(path_of(options, f"{kind}:{name}"))]


def is_done(options: Options, cell: str) -> bool:
    """Whether a cell's rows are there, made with these options."""
    rows = read(path_of(options, cell))
    return bool(rows) and all(row.get("world", options.world) == options.world for row in rows)


def responses_of(options: Options, name: str) -> Path:
    """The file of a policy's responses to the test prompts."""
    return Path(options.rows) / f"responses_{name}.jsonl"


def run_cell(options: Options) -> None:
    """The cell of this process; its rows are written last, so an interrupted cell is done again."""
    enable_compilation_cache()
    kind, _, name = options.cell.partition(":")
    cells: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "annotator": lambda: train_annotator(options, name),
        "reference": lambda: respond(options),
        "sweep": lambda: sweep(options, name),
        "final": lambda: final(options, name),
        "judge": lambda: judged(options),
    }
    rows = cells[kind]()
    write_json_lines(
        path_of(options, options.cell), [row | {"world": options.world} for row in rows]
    )


# ------------------------------------------------------------------------------ annotators


def prepare(options: Options) -> None:
    """Write pairs and prompts, if they are not there."""
    folder = Path(options.folder) / "data"
    names = ("longest", "tokens", "validation", "test")
    made = {name: getattr(options, name) for name in names} | {"model": options.model}
    file = folder / "prompts.json"
    if file.exists():
        own = json.loads(file.read_text(encoding="utf-8"))
        if own["made"] != made:
            sys.exit(f"{file} was made with {own['made']}, not {made}; set another --folder")
    else:
        data = small_data.split(load_tokenizer(options.model), response=options.tokens)
        small_data.write(data, folder)
        number = options.validation + options.test
        unseen = data.unseen[:number]
        own = {"made": made, "train": data.prompts}
        mixed = [unseen[at] for at in np.random.default_rng(0).permutation(len(unseen))]
        own["validation"], own["test"] = mixed[: options.validation], mixed[options.validation :]
        if len(unseen) < number:
            sys.exit(f"--validation, --test: there are {len(data.unseen)} held-out prompts")
        write_json(file, own)
        print(*(f"{len(x)} {name}" for name, x in vars(data).items()), sep=", ", flush=True)
    write_json_lines(Path(options.rows) / "prompts.jsonl", own["test"])


def on_accelerator() -> bool:
    """Whether there is one; then computation is in bfloat16."""
    return jax.default_backend() != "cpu"


def annotator_config(options: Options, name: str) -> TrainConfig:
    """A model with a scalar head that begins as the policy does."""
    kind, loss, file, seed = ANNOTATORS[name]
    data, number = Path(options.folder) / "data", 2 if kind == "preference" else 1
    return TrainConfig(
        name=f"annotator_{name}",
        output=options.folder,
        model=options.model,
        data=(str(data / f"{file}.jsonl"),),
        eval_data=(str(data / "held_out.jsonl"),),
        max_length=3 * options.longest + number * options.tokens,
        end_token=False,
        preference=PreferenceConfig(
            epochs=options.epochs,
            batch_size=16,
            optimizer=OptimizerConfig(
                learning_rate=options.annotator_rate, schedule="cosine", warmup_fraction=0.1
            ),
            loss=loss,
        ),
        dtype="bfloat16" if on_accelerator() else "float32",
        attention="blocked",
        seed=seed,
    )


def load_annotator(options: Options, name: str) -> Any:
    """A trained annotator."""
    kind, *_ = ANNOTATORS[name]
    dtype = "bfloat16" if on_accelerator() else "float32"
    size = 64 if on_accelerator() else 8
    folder = Path(options.folder) / f"annotator_{name}"
    return make_annotator(f"{kind}:{folder}", AnnotatorOptions(dtype=dtype, batch_size=size))


def train_annotator(options: Options, name: str) -> list[dict[str, Any]]:
    """Train an annotator; its accuracy and calibration on held-out pairs, by source and on all."""
    finished(annotator_config(options, name))
    pairs = read(Path(options.folder) / "data" / "held_out.jsonl")
    sides = ([row[side] for row in pairs] for side in ("prompt", "chosen", "rejected"))
    with forward_mode():
        preference = np.asarray(load_annotator(options, name).preferences(*sides).preference)
    longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in pairs])
    rows = []
    for source in (*small_data.SOURCES, "all"):
        own = np.array([source in (row["source"], "all") for row in pairs])
        table = reliability(preference[own])
        rows.append(
            {
                "annotator": name,
                "source": source,
                "pairs": int(own.sum()),
                "accuracy": float(np.mean(preference[own] > 0.5)),
                "longer": float(np.mean((longer[own] > 0) + 0.5 * (longer[own] == 0))),
                "error": table.error,
                "bins": table.rows(),
            }
        )
    return rows


# ------------------------------------------------------------------------------ runs


class World:
    """Model, prompts and annotators of a cell."""

    def __init__(self, options: Options, name: str):
        method, prompts = METHODS[name]
        method = dataclasses.replace(method, rate=method.rate * options.rate)
        dtype = jnp.bfloat16 if on_accelerator() else jnp.float32
        model = load_pretrained(options.model, dtype=dtype)
        tokenizer = load_tokenizer(options.model)
        file = Path(options.folder) / "data" / "prompts.json"
        self.prompts = json.loads(file.read_text(encoding="utf-8"))
        self.rows = {
            part: small_data.tokenized(self.prompts[part], tokenizer, longest=options.longest)
            for part in ("train", "validation", "test")
        }
        self.runs = Runs(
            method,
            model.params,
            model.config,
            tokenizer,
            ends=end_tokens(options.model, model.config.vocab_size),
            prompts=prompts,
            longest=max(int(rows.length.max()) for rows in self.rows.values()),
            tokens=options.tokens,
            dtype=dtype,
        )
        self.own = "reward" if name in REWARDED else "preference"
        self._options = options

    @functools.cached_property
    def annotators(self) -> dict[str, Any]:
        """All three by name; waits for those that another process still trains."""
        while not all(is_done(self._options, f"annotator:{name}") for name in ANNOTATORS):
            time.sleep(0.5)
        return {name: load_annotator(self._options, name) for name in ANNOTATORS}

    def texts(self, part: str, batch: PromptBatch) -> list[str]:
        """The prompts of a batch."""
        return [self.prompts[part][int(at)]["prompt"] for at in batch.record_index]

    def batches(self, part: str, number: int) -> Iterator[PromptBatch]:
        """The first prompts of a part, batch by batch; the last ones fill the last batch again."""
        number, size = min(number, len(self.rows[part])), self.runs.prompts
        for first in range(0, number, size):
            yield self.runs.batch(self.rows[part], np.arange(first, first + size) % number)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the policies of all runs say to some prompts: prompt by prompt, sample by sample."""

    texts: list[list[list[str]]]
    """[runs][prompts][samples]."""
    kl: np.ndarray
    length: np.ndarray
    finished: np.ndarray


def answers(
    world: World, state: Any, part: str, number: int, seeds: Sequence[int], draw: int
) -> Answers:
    """Responses of all runs' policies to the first prompts of a part, and their divergences."""
    samples: list[list[Sampled]] = []
    ratios: list[np.ndarray] = []
    for at, batch in enumerate(world.batches(part, number)):
        batches = [batch] * len(seeds)
        samples.append(world.runs.of_policy(state, batches, seeds, draw + at))
        ratios.append(world.runs.divergences(state, batches, samples[-1]))
    every = range(len(seeds))
    number = min(number, len(world.rows[part]))
    texts = [[row for one in samples for row in one[run].texts][:number] for run in every]

    def joined(name: str) -> np.ndarray:
        own = [np.concatenate([getattr(x[run], name) for x in samples]) for run in every]
        return np.stack(own)[:, :number]

    ratio = np.concatenate(ratios, axis=1)[:, :number]
    return Answers(texts=texts, kl=ratio, length=joined("length"), finished=joined("finished"))


def measured(world: World, part: str, ours: Answers, theirs: Answers) -> list[dict[str, float]]:
    """Numbers of each run's policy beside the reference's responses to the same prompts."""
    prompts = [row["prompt"] for row in world.prompts[part][: len(ours.texts[0])]]
    samples, runs = len(ours.texts[0][0]), len(ours.texts)
    repeated = [prompt for prompt in prompts for _ in range(samples)] * runs
    flat, other = ([text for run in x.texts for row in run for text in row] for x in (ours, theirs))

    def by_run(x: Any) -> np.ndarray:
        return np.nanmean(np.asarray(x).reshape(runs, -1), axis=1)

    scores = {}
    with forward_mode():
        for name, annotator in world.annotators.items():
            same = np.full(len(flat), 0.5)  # the reference beside itself
            wins = (
                same if ours is theirs else annotator.preferences(repeated, flat, other).preference
            )
            scores[f"wins/{name}"] = by_run(wins)
        scores["reward"] = by_run(world.annotators["reward"].rewards(repeated, flat))
    scores |= {name: by_run(getattr(ours, name)) for name in ("kl", "length", "finished")}
    return [{name: float(x[run]) for name, x in scores.items()} for run in range(runs)]


def trained(
    options: Options,
    world: World,
    strengths: Sequence[float],
    seeds: Sequence[int],
    updates: int,
    validation: int,
    evaluations: int,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train runs together.

    Args:
      options: of the command.
      world: of the method.
      strengths: of each run.
      seeds: of each run.
      updates: of all.
      validation: number of prompts of an evaluation.
      evaluations: number of them after the first one, at equal distances.

    Returns:
      The last state, and a row of numbers for each run.
    """
    runs, method = world.runs, world.runs.method
    state = runs.begin(seeds)
    theirs = answers(world, state, "validation", validation, seeds, 1_000)
    first = [next(world.batches("validation", runs.prompts))] * len(seeds)
    runs.compile_update(state, first, strengths)
    curves = [[{"update": 0, **one}] for one in measured(world, "validation", theirs, theirs)]
    history: list[list[dict[str, float]]] = [[] for _ in seeds]
    seconds = []
    orders = [order(seed, len(world.rows["train"]), runs.prompts, updates) for seed in seeds]
    at = {round(updates * (x + 1) / evaluations / 2) * 2 for x in range(evaluations)} | {updates}
    annotator = world.annotators[world.own]
    for update in range(updates):
        begun = time.perf_counter()
        batches = [runs.batch(world.rows["train"], own[update]) for own in orders]
        sampled = runs.draw(state, batches, seeds, update)
        texts = [world.texts("train", batch) for batch in batches]
        with forward_mode():
            verdicts = annotations(annotator, runs.plain, texts, sampled)
        rollouts = runs.rollouts(batches, sampled, verdicts)
        # an extragradient's two steps share a rate
        past = update // 2 * 2 if runs.plain.extragradient else update
        rate = method.rate * (1 - past / updates)
        state, metrics = runs.update(state, rollouts, strengths, rate)
        for own, one, drawn in zip(history, metrics, sampled, strict=True):
            own.append(one | {"length": float(drawn.length.mean())})
        seconds.append(time.perf_counter() - begun)
        if update + 1 in at:
            ours = answers(world, state, "validation", validation, seeds, 2_000 + 50 * update)
            for own, one in zip(curves, measured(world, "validation", ours, theirs), strict=True):
                own.append({"update": update + 1, **one})
            last = [own[-1] for own in curves]
            wins, kl = ([f"{one[x]:.2f}" for one in last] for x in (f"wins/{world.own}", "kl"))
            print(f"update {update + 1}: wins {wins}, KL {kl}, {seconds[-1]:.2f} s", flush=True)
    kept = ("loss", "log_ratio", "entropy", "length", "grad_norm", "finite")
    rows = [
        {
            "algorithm": method.name,
            "parameter": method.parameter,
            "strength": strength,
            "seed": seed,
            "updates": updates,
            "rate": method.rate,
            "seconds_per_update": float(np.median(seconds[1:] or seconds)),
            "first_update_seconds": seconds[0],
            "device": jax.devices()[0].device_kind,
            "curve": curve,
            "train": {x: [round(one[x], 5) for one in own] for x in kept if x in own[0]},
        }
        for strength, seed, curve, own in zip(strengths, seeds, curves, history, strict=True)
    ]
    return state, rows


def sweep(options: Options, name: str) -> list[dict[str, Any]]:
    """Short runs of a method, one for each strength."""
    world, strengths = World(options, name), STRENGTHS[name]
    updates, prompts = options.sweep_updates, options.validation
    return trained(options, world, strengths, [0] * len(strengths), updates, prompts, 1)[1]


def chosen(options: Options, name: str) -> float:
    """The strength whose run wins most over the reference, in its own annotator's eyes."""
    own = "reward" if name in REWARDED else "preference"
    rows = read(path_of(options, f"sweep:{name}"))
    if not rows:
        sys.exit(f"{name}: no sweep; run --step sweep first")
    return max(rows, key=lambda row: row["curve"][-1][f"wins/{own}"])["strength"]


def final(options: Options, name: str) -> list[dict[str, Any]]:
    """Runs of a method with its chosen strength, one for each seed, and what they say."""
    world, strength = World(options, name), chosen(options, name)
    strengths, prompts = [strength] * len(SEEDS), options.validation // 2
    state, rows = trained(options, world, strengths, SEEDS, options.updates, prompts, 4)
    write_responses(options, world, state, name)
    return rows


def respond(options: Options) -> list[dict[str, Any]]:
    """What the reference says to the test prompts, with three seeds."""
    world = World(options, "online_dpo")
    write_responses(options, world, world.runs.begin(SEEDS), "reference")
    return [{"algorithm": "reference", "seed": seed} for seed in SEEDS]


def write_responses(options: Options, world: World, state: Any, name: str) -> None:
    """One response to each test prompt of each run."""
    own = answers(world, state, "test", options.test, SEEDS, 900_000)
    rows = [
        {
            "policy": name,
            "seed": seed,
            "prompt": at,
            "response": own.texts[run][at][0],
            "tokens": int(own.length[run, at, 0]),
            "finished": bool(own.finished[run, at, 0]),
            "log_ratio": round(float(own.kl[run, at, 0]), 4),
        }
        for run, seed in enumerate(SEEDS)
        for at in range(len(own.texts[run]))
    ]
    write_json_lines(responses_of(options, name), rows)


# ------------------------------------------------------------------------------ judging


def judged(options: Options) -> list[dict[str, Any]]:
    """All policies against all, seed by seed, before the judge; and the annotators' own view.

    The annotators compare each policy with the reference alone.
    """
    prompts = [row["prompt"] for row in read(Path(options.rows) / "prompts.jsonl")]
    said = {
        name: small_tables.by_seed(read(responses_of(options, name)), "response")
        for name in (*options.methods, "reference")
        if responses_of(options, name).exists()
    }
    names, rows = list(said), []
    pairs = [(one, other) for at, one in enumerate(names) for other in names[at + 1 :]]
    for annotator in ANNOTATORS:
        asked = [
            (one, other, seed)
            for one, other in pairs
            if annotator == "judge" or other == "reference"
            for seed in SEEDS
        ]
        model: RewardModel | PreferenceModel = load_annotator(options, annotator)
        sides = (
            [text for one, other, seed in asked for text in said[(one, other)[side]][seed]]
            for side in (0, 1)
        )
        with forward_mode():
            verdicts = model.preferences(prompts * len(asked), *sides)
        by_pair = np.asarray(verdicts.preference).reshape(len(asked), len(prompts))
        for (one, other, seed), own in zip(asked, by_pair, strict=True):
            rows.append(
                {
                    "annotator": annotator,
                    "one": one,
                    "other": other,
                    "seed": seed,
                    "preference": np.round(own, 4).tolist(),
                }
            )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
