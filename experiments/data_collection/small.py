"""Pairs that a real chat model makes in four ways, and DPO on each beside people's labels.

Command:  python -m experiments.data_collection.small --model FOLDER --reward REWARD_FOLDER
Needs:    a chat model of 135M parameters (FOLDER), the reward model of experiments/judging/small
Time:     about three quarters of an hour on one CPU core
Expect:   a file under rows/ for every part; small.png, the sections "small ..." of the README

Prompts and people's labels are PandaLM's: of some prompts the model collects pairs (or people's are
taken), and the others are held out. DPO trains adapters, in the same way on all. A part whose row
is there is not run again. Without --model only the tables are made.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.data_collection.compare import slug
from experiments.data_collection.tasks import Pair, rows_of, write_rows
from experiments.page import put, table
from experiments.rows import Rows, models_of, same_options
from experiments.runs import DATA, finished
from jaxalign.backends import BackendOptions, Decoding
from jaxalign.backends.local import LocalModel
from jaxalign.collection import (
    BestOfN,
    Constitutional,
    Method,
    SelfAlignment,
    SimulatedSociety,
    collect,
)
from jaxalign.config import LoraConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.evaluation import win_rate
from jaxalign.evaluation.reward_models import RewardModel
from jaxalign.evaluation.win_rates import bootstrap_mean
from jaxalign.models.devices import enable_compilation_cache

FOLDER = Path(__file__).parent
PANDALM = DATA / "judging" / "pandalm_human.jsonl"
PEOPLE = "people's labels"
METHODS = ("best and worst of n", "critique and revision", "self-alignment", "society")
FEWEST = 16
"""Pairs to train on; of fewer nothing is learnt that would be worth a row."""
SHOWN = 3
"""Pairs of each method in its row, to read."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Models, data and sizes."""

    model: str | None = None
    """Chat model: Hugging Face folder; None: only the tables are made."""
    reward: str = "runs/judging_small/reward_model"
    """Reward model that rates samples and answers: folder of a run."""
    methods: tuple[str, ...] = (PEOPLE, *METHODS)
    """What to train on."""
    number: int = 48
    """Number of prompts to collect from."""
    held_out: int = 40
    """Number of held-out prompts that are answered."""
    each: int = 2
    """Most held-out pairs of a prompt."""
    samples: int = 4
    """Number of samples of each prompt, of which the best and the worst are kept."""
    max_tokens: int = 64
    """Largest number of tokens of a text."""
    steps: int = 30
    """Updates of DPO, of 8 pairs."""
    train: bool = True
    """Whether to train on the pairs; otherwise they are only collected."""
    prompt_longest: int = 240
    """Most characters of a prompt."""
    longest: int = 400
    """Most characters of a response of people's pairs."""
    output: Path = Path("runs/collection_small")
    """Folder of what is collected, and of the runs."""
    rows: Path = FOLDER / "rows"
    """Folder of the rows."""


# ------------------------------------------------------------------------------ data


@dataclass(frozen=True, kw_only=True)
class Data:
    """PandaLM's short comparisons, split by prompt."""

    prompts: Sequence[str]
    """To collect from."""
    people: Sequence[Pair]
    """One pair by people of each of these."""
    fresh: Sequence[str]
    """Held-out prompts."""
    pairs: Sequence[Pair]
    """Held-out pairs by people."""


def split(rows: Sequence[Mapping[str, str]], options: Options) -> Data:
    """Split comparisons by prompt, at random but always the same.

    Raises:
      UserError: there are not enough prompts.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for row in rows:
        own = {name: row[name].strip() for name in ("prompt", "chosen", "rejected")}
        longer = max(len(own["chosen"]), len(own["rejected"]))
        shorter = min(len(own["chosen"]), len(own["rejected"]))
        fits = len(own["prompt"]) <= options.prompt_longest and longer <= options.longest
        if fits and shorter and own["chosen"] != own["rejected"]:
            by_prompt.setdefault(own["prompt"], []).append(own)
    names = list(by_prompt)
    order = [names[at] for at in np.random.default_rng(0).permutation(len(names))]
    if len(order) <= options.number:
        raise UserError(f"number: there are {len(order)} short prompts; take fewer")
    known, fresh = order[: options.number], order[options.number :]
    return Data(
        prompts=known,
        people=[by_prompt[prompt][0] for prompt in known],
        fresh=fresh,
        pairs=[pair for prompt in fresh for pair in by_prompt[prompt][: options.each]],
    )


# ------------------------------------------------------------------------------ collecting


def method_of(name: str, options: Options) -> Method:
    """A method of collecting."""
    if name == "best and worst of n":
        return BestOfN(annotator=f"reward:{options.reward}", samples=options.samples)
    if name == "critique and revision":
        principles = FOLDER / "principles_helpful.json"
        return Constitutional(principles=principles, revisions=1, keep_cut=True)
    if name == "self-alignment":
        return SelfAlignment()
    rounds = math.ceil(options.number / 9)
    return SimulatedSociety(ratings="scored", rounds=rounds, neighbours=2)


def gathered(name: str, options: Options, data: Data, rows: Rows) -> Sequence[Pair]:
    """The pairs of a method, collected once; their statistics and some of them go to a row."""
    folder = options.output / slug(name)
    path, row = folder / "train.jsonl", f"pairs_{slug(name)}"
    if path.is_file() and row in rows:
        return rows_of(path)
    began, cpu = time.perf_counter(), time.process_time()
    statistics: dict[str, Any] = {}
    pairs: Sequence[Pair]
    if name == PEOPLE:
        pairs = data.people
    else:
        source = write_rows(folder / "prompts.jsonl", [{"prompt": x} for x in data.prompts])
        found = collect(
            method_of(name, options),
            model=str(options.model),
            prompts=str(source),
            folder=folder,
            decoding=Decoding(max_tokens=options.max_tokens, temperature=0.7),
            options=BackendOptions(batch_size=16),
        )
        statistics = found.statistics
        pairs = [
            {side: row[side].strip() for side in ("prompt", "chosen", "rejected")}
            for row in rows_of(found.path)
        ]
    if pairs:
        write_rows(path, pairs)
    kept = ("left_out", "faults", "prompts_without_a_pair", "feedback", "feedback_rated", "rules")
    rows.write(
        row,
        {
            "pairs": len(pairs),
            "words": {x: [len(p[x].split()) for p in pairs] for x in ("chosen", "rejected")},
            "reward_prefers_chosen": agreed(options, pairs),
            "statistics": {x: statistics[x] for x in kept if x in statistics},
            "shown": [] if name == PEOPLE else pairs[:SHOWN],
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        },
    )
    return pairs


def agreed(options: Options, pairs: Sequence[Pair]) -> list[float]:
    """The reward model's P(chosen is better) of each pair."""
    if not pairs:
        return []
    judge = RewardModel.load(options.reward, batch_size=8)
    sides = ([pair[side] for pair in pairs] for side in ("prompt", "chosen", "rejected"))
    return judge.preferences(*sides).preference.tolist()


# ------------------------------------------------------------------------------ training


def training(name: str, options: Options) -> TrainConfig:
    """DPO by adapters on the pairs of a method."""
    rule = OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_fraction=0.1)
    return TrainConfig(
        name=f"dpo_{slug(name)}",
        output=str(options.output),
        model=str(options.model),
        data=(str(options.output / slug(name) / "train.jsonl"),),
        holdout=0.0,
        max_length=256,
        end_token=False,  # most samples are cut at max_tokens, and do not end there
        lora=LoraConfig(rank=16, alpha=32.0),
        preference=PreferenceConfig(
            loss="dpo",
            loss_options={"beta": 0.1},
            steps=options.steps,
            batch_size=8,
            optimizer=rule,
        ),
    )


def measured(options: Options, data: Data, folder: str | Path) -> dict[str, Any]:
    """Log-probs of held-out pairs, and greedy answers to held-out prompts with their rewards."""
    model = LocalModel.load(folder, batch_size=8)
    prompts = [pair["prompt"] for pair in data.pairs]
    texts = [pair[side] for side in ("chosen", "rejected") for pair in data.pairs]
    scores = model.score([*prompts, *prompts], texts)
    asked = list(data.fresh[: options.held_out])
    replies = model.generate(asked, Decoding(max_tokens=options.max_tokens))
    answers = [one.text.strip() for [one] in replies]
    judge = RewardModel.load(options.reward, batch_size=8)
    return {
        "log_probs": [
            [one.log_prob, other.log_prob]
            for one, other in zip(scores[: len(prompts)], scores[len(prompts) :], strict=True)
        ],
        "answers": answers,
        "finished": [one.finished for [one] in replies],
        "rewards": judge.rewards(asked, answers).tolist(),
    }


def trained(name: str, options: Options, data: Data, rows: Rows) -> None:
    """Collect the pairs of a method, train on them, and measure the model."""
    pairs = gathered(name, options, data, rows)
    if f"dpo_{slug(name)}" in rows or not options.train:
        return
    if len(pairs) < FEWEST:
        print(f"{name}: {len(pairs)} pairs are too few to train on")
        return
    began = time.process_time()
    run = finished(training(name, options))
    cpu = time.process_time() - began
    row = measured(options, data, run)
    rows.write(
        f"dpo_{slug(name)}",
        row | {"pairs": len(pairs), "steps": options.steps, "training_cpu_seconds": cpu},
    )


# ------------------------------------------------------------------------------ the page


def pairs_table(rows: Rows, names: Sequence[str]) -> str:
    """What was collected."""
    lines = []
    for name in names:
        row = rows[f"pairs_{slug(name)}"]
        words = {side: np.array(values) for side, values in row["words"].items()}
        cells = ["", "", "", ""]
        if row["pairs"]:
            gap = words["chosen"] - words["rejected"]
            longer = np.mean(np.where(gap == 0, 0.5, gap > 0))
            found = win_rate(np.array(row["reward_prefers_chosen"]).round())
            cells = [f"{words[x].mean():.1f}" for x in ("chosen", "rejected")]
            cells += [f"{longer:.2f}", f"{found.rate:.2f}"]
        minutes = f"{row['cpu_seconds'] / 60:.1f}"
        lines.append([name, str(row["pairs"]), *cells, reasons(row), minutes])
    header = ["method", "pairs", "words of chosen", "words of rejected", "chosen longer"]
    return table([*header, "reward model agrees", "left out, or at fault", "CPU minutes"], lines)


def reasons(row: Mapping[str, Any]) -> str:
    """Why prompts have no pair."""
    found = row["statistics"]
    why = dict(found.get("left_out", {})) | dict(found.get("faults", {}))
    if found.get("prompts_without_a_pair"):
        why["equal rewards"] = found["prompts_without_a_pair"]
    ordered = sorted(((n, reason) for reason, n in why.items() if n), reverse=True)
    return "; ".join(f"{n} {reason}" for n, reason in ordered[:4])


def learnt_table(rows: Rows, names: Sequence[str]) -> str:
    """What was learnt: people's held-out pairs, and answers to held-out prompts."""
    base, held_out = rows["base"], rows["data"]["pair_prompts"]
    own = answer_cells(base, base)
    longer = np.array(rows["data"]["pair_words"]) @ [1, -1]
    lines = [["base model", *[""] * 6, own[0], "", *own[2:]]]
    for name in names:
        if f"dpo_{slug(name)}" not in rows:
            continue
        row, change = rows[f"dpo_{slug(name)}"], changes(rows, name)
        gap, right = margins(change)
        cells = [with_interval(right, held_out, "{:.3f}")]
        cells += [f"{right[mask].mean():.2f}" for mask in (longer > 0, longer < 0)]
        cells += [with_interval(gap, held_out, "{:+.2f}"), f"{change[:, 0].mean():+.1f}"]
        lines.append([name, str(row["pairs"]), *cells, *answer_cells(row, base)])
    header = ["trained on", "pairs", f"accuracy ({len(longer)})"]
    header += [f"preferred is longer ({(longer > 0).sum()})", f"shorter ({(longer < 0).sum()})"]
    header += ["Δ margin (nats)", "Δ chosen (nats)"]
    header += ["mean reward", "reward above the base's", "words", "ended", "distinct word pairs"]
    return table(header, lines)


def changes(rows: Rows, name: str) -> np.ndarray:
    """Of the log-probs of held-out pairs in nats, [pairs, 2]: chosen, rejected."""
    after, before = (np.array(rows[x]["log_probs"]) for x in (f"dpo_{slug(name)}", "base"))
    return after - before


def margins(change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes of the margins of pairs, and which of them grew: 1, 1/2 or 0."""
    gap = change[:, 0] - change[:, 1]
    return gap, np.where(gap == 0, 0.5, gap > 0)


def plot(rows: Rows, path: Path) -> None:
    """Held-out accuracy, by which response people preferred, and the change of the margin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in (PEOPLE, *METHODS) if f"dpo_{slug(name)}" in rows]
    held_out = rows["data"]["pair_prompts"]
    longer = np.array(rows["data"]["pair_words"]) @ [1, -1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained", sharey=True)
    for at, name in enumerate(names):
        gap, right = margins(changes(rows, name))
        for axis, values in zip(axes, (right, gap), strict=True):
            axis.plot(bootstrap_mean(values, held_out), [at, at], color="C0")
            axis.plot(values.mean(), at, "o", color="C0", label=None if at else "all pairs")
        for mask, marker, label in (
            (longer > 0, ">", "people preferred the longer"),
            (longer < 0, "<", "people preferred the shorter"),
        ):
            look = {"color": "grey", "markersize": 5, "label": None if at else label}
            axes[0].plot(right[mask].mean(), at, marker, **look)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].axvline(0.5, color="black", linewidth=0.8)
    axes[1].axvline(0, color="black", linewidth=0.8)
    axes[0].set(xlabel="accuracy on people's held-out labels", xlim=(0, 1))
    axes[1].set(xlabel="change of the margin of held-out pairs (nats)")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    axes[0].margins(y=0.15)
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def with_interval(values: np.ndarray, groups: Sequence[object] | None, form: str) -> str:
    """The mean, with its 95 % interval from a bootstrap over prompts."""
    low, high = bootstrap_mean(np.asarray(values, float), groups)
    return f"{form.format(values.mean())} ({form.format(low)} to {form.format(high)})"


def answer_cells(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """The cells of a model's answers."""
    rewards, words = np.array(row["rewards"]), [x.lower().split() for x in row["answers"]]
    two = [pair for text in words for pair in itertools.pairwise(text)]
    return [
        f"{rewards.mean():.2f}",
        with_interval(rewards - np.array(base["rewards"]), None, "{:+.2f}"),
        f"{np.mean(list(map(len, words))):.1f}",
        f"{sum(row['finished'])} of {len(words)}",
        f"{len(set(two)) / max(len(two), 1):.2f}",
    ]


def examples(rows: Rows, names: Sequence[str]) -> str:
    """Some real pairs of each method."""
    parts = []
    for name in names:
        shown = rows[f"pairs_{slug(name)}"]["shown"]
        if shown:
            sides = ["prompt", "chosen", "rejected"]
            lines = [[one_line(pair[side]) for side in sides] for pair in shown]
            left = table(sides, lines).replace("---:", "---")
            parts.append(f"{name[0].upper()}{name[1:]}:\n\n{left}")
    return "\n".join(parts)


def one_line(text: str, most: int = 220) -> str:
    """A text in a cell of a table, cut."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= most else f"{flat[:most].rsplit(' ', 1)[0]} …"


def sections(rows: Rows) -> dict[str, str]:
    """Name of a section of the README -> the tables of the rows that are there."""
    names = [name for name in (PEOPLE, *METHODS) if f"pairs_{slug(name)}" in rows]
    if not names:
        return {}
    learnt = []
    if "base" in rows:
        learnt = [learnt_table(rows, names), "![what people's held-out labels say](small.png)\n"]
    tables = "\n".join([*learnt, pairs_table(rows, names)])
    return {"small": tables, "small pairs": examples(rows, names)}


def main(options: Options) -> None:
    """Do what is missing, and write the sections of the README."""
    rows = Rows(folder=options.rows)
    if unknown := set(options.methods) - {PEOPLE, *METHODS}:
        known = ", ".join((PEOPLE, *METHODS))
        raise UserError(f"methods: {', '.join(sorted(unknown))}: not one of {known}")
    if options.model is not None:
        enable_compilation_cache()
        path = options.rows.with_name(f"{options.rows.name}_options.json")
        same_options(path, models_of(model=options.model))
        data = split(rows_of(PANDALM), options)
        numbers = {prompt: at for at, prompt in enumerate(data.fresh)}
        own = {
            "prompts": len(data.prompts),
            "held_out_prompts": len(data.fresh),
            "pair_prompts": [numbers[pair["prompt"]] for pair in data.pairs],
            "pair_words": [
                [len(pair[side].split()) for side in ("chosen", "rejected")] for pair in data.pairs
            ],
        }
        if "data" not in rows:
            rows.write("data", own)
        elif rows["data"] != own:
            raise UserError(f"{options.rows}: was made with other data; set another --rows")
        if "base" not in rows:
            rows.write("base", measured(options, data, options.model))
        for name in options.methods:
            trained(name, options, data, rows)
    for name, text in sections(rows).items():
        print(text)
        put(FOLDER, name, text)
    if "base" in rows:
        plot(rows, FOLDER / "small.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        raise SystemExit(f"small: {error}") from None
