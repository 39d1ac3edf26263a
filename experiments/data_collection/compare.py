"""DPO on every kind of collected pairs beside DPO on labelled ones, by one schedule.

Command:  python -m experiments.data_collection.compare glad|polite [--seeds 0 1 2] [--model FOLDER]
Needs:    polite: the base model of experiments/base_lm
Time:     glad about half an hour, polite about two hours on two CPU cores; what is there is kept
"""

import argparse
import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_collection.dpo import config
from experiments.data_collection.tasks import TASKS, Pair, Task, collected, rows_of, write_rows
from experiments.page import put, table
from experiments.runs import finished
from jaxalign.backends import Decoding
from jaxalign.backends.local import LocalModel
from jaxalign.collection import BestOfN
from jaxalign.config import PreferenceConfig, SupervisedConfig, TrainConfig
from jaxalign.evaluation import make_annotator, win_rate
from jaxalign.models.devices import enable_compilation_cache

FOLDER = Path(__file__).parent
FEWEST = 32
"""Pairs to train on; of fewer nothing is learnt that would be worth a row."""
SAMPLES = 2
"""Responses to each held-out prompt."""


def training(task: Task, name: str, data: Path, seed: int, folder: Path) -> TrainConfig:
    """DPO on pairs, or SFT on responses to imitate, by the same schedule."""
    made = dataclasses.replace(
        config("tiny"),
        name=name,
        output=str(folder),
        model=task.model,
        data=str(data),
        seed=seed,
        max_length=160,
        prompt_format=task.prompt_format,
    )
    if "response" in rows_of(data)[0]:
        length = {
            key: getattr(made.preference, key)
            for key in ("steps", "batch_size", "optimizer", "eval_every")
        }
        sft = SupervisedConfig(data=str(data), **length)
        return dataclasses.replace(made, sft=sft, preference=PreferenceConfig(), data="embedded")
    return made


def gathered(
    task: Task, folder: Path, seed: int
) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]]]:
    """Training rows of every method and every labelled set, and the statistics of the methods."""
    rows: dict[str, list[Any]] = {}
    statistics: dict[str, dict[str, Any]] = {}
    sampled = folder / "best_and_worst_of_8"
    for name, method in task.methods.items():
        place = folder / slug(name)
        known = sampled / "answers.jsonl"
        if isinstance(method, BestOfN) and known.is_file() and not place.exists():
            place.mkdir(parents=True)
            shutil.copy(known, place / "answers.jsonl")  # the same samples, selected otherwise
        rows[name] = collected(task, place, method, task.prompts, seed)
        if "SFT" in name:
            rows[name] = [
                {"prompt": row["prompt"], "response": row["response"].strip()}
                for row in rows_of(place / "sft.jsonl")
            ]
        statistics[name] = json.loads((place / "statistics.json").read_text(encoding="utf-8"))
    for name, pairs in task.labelled.items():
        rows[name] = [dict(pair) for pair in pairs]
    return rows, statistics


def slug(name: str) -> str:
    """A name of a folder."""
    words = "".join(letter if letter.isalnum() else " " for letter in name).split()
    return "_".join(words).lower()


def log_probs(model: LocalModel, task: Task, pairs: Sequence[Pair]) -> np.ndarray:
    """Of both responses of each pair, [pairs, 2], in nats."""
    prompts = [task.prompt_format.format(prompt=pair["prompt"]).rstrip() for pair in pairs]
    found = [
        [one.log_prob for one in model.score(prompts, [f" {pair[side]}" for pair in pairs])]
        for side in ("chosen", "rejected")
    ]
    return np.array(found).T


def measured(task: Task, folder: str | Path, place: Path, seed: int) -> dict[str, Any]:
    """What a model writes to the held-out prompts, and what it thinks of the held-out pairs."""
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    layout = task.prompt_format.rstrip()
    model = LocalModel.load(folder, batch_size=32, prompt_format=layout)
    decoding = Decoding(
        max_tokens=task.max_tokens, temperature=1.0, stop=tuple(task.stops), seed=1000 + seed
    )
    said = model.generate(list(task.held_out), decoding, samples=SAMPLES)
    plain = LocalModel(model.model, model.tokenizer, identity="", batch_size=32)
    found = {
        "responses": [[one.text.strip() for one in row] for row in said],
        "log_probs": {
            name: log_probs(plain, task, pairs).tolist() for name, pairs in task.pairs.items()
        },
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return found


def scored(
    task: Task, own: Mapping[str, Any], base: Mapping[str, Any], judge: Any
) -> dict[str, Any]:
    """The measures of a row."""
    prompts = [prompt for prompt in task.held_out for _ in range(SAMPLES)]
    ours, theirs = ([text for row in one["responses"] for text in row] for one in (own, base))
    words = [text.lower().split() for text in ours]
    pairs = [pair for text in words for pair in itertools.pairwise(text)]
    found: dict[str, Any] = {
        "rule": float(np.mean([task.rule("", text) for text in ours])),
        "reward": float(np.nanmean(judge.rewards(prompts, ours))),
        "words": float(np.mean(list(map(len, words)))),
        "distinct": len(set(pairs)) / max(len(pairs), 1),
        "preference": judge.preferences(prompts, ours, theirs).preference,
    }
    for name in task.pairs:
        change = np.array(own["log_probs"][name]) - np.array(base["log_probs"][name])
        gap = change[:, 0] - change[:, 1]
        found[f"accuracy, {name}"] = float(np.mean(np.where(gap == 0, 0.5, gap > 0)))
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, and from where to where they go."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1 or max(values) - min(values) < 1e-12:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def yields(statistics: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """The table of what was collected, the first seed's."""
    rows = []
    for name, found in statistics[0].items():
        left = found["left_out"] | found.get("faults", {})
        if found.get("prompts_without_a_pair") and "sft" not in found:
            left["equal rewards"] = found["prompts_without_a_pair"]
        if "feedback" in found:
            left["feedback without a rating"] = found["feedback"] - found["feedback_rated"]
        reasons = sorted(((n, why) for why, n in left.items() if n), reverse=True)
        kept = found["sft"] if "RAFT" in name else found["pairs"]
        longer = f"{found['chosen_longer']:.2f}" if found["pairs"] else ""
        different = found["distinct_2"]
        both = f"{different['chosen']:.2f} / {different['rejected']:.2f}" if different else ""
        why = "; ".join(f"{n:,} {reason}" for n, reason in reasons[:4])
        rows.append([name, f"{kept:,}", longer, both, why])
    header = ["way", "usable", "chosen longer", "distinct word pairs", "left out, or at fault"]
    return table(header, rows)


def rows_of_table(task: Task, each: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The table of what was learnt."""
    accuracies = [f"accuracy, {name}" for name in task.pairs]
    rows = []
    for name in names:
        own = [one[name] for one in each if name in one]
        if not own:
            continue
        rate = "0.5"
        if name != "base":
            better = np.concatenate([one["preference"] for one in own])
            prompts = [at // SAMPLES for one in own for at in range(len(one["preference"]))]
            found = win_rate(better, groups=prompts)
            rate = f"{found.rate:.3f} ({found.bootstrap[0]:.3f} to {found.bootstrap[1]:.3f})"
        cells = [spread([one[key] for one in own], 3) for key in accuracies]
        cells = ["" for _ in cells] if name == "base" else cells
        learnt = [] if task.judge.startswith("rule:") else [spread([x["reward"] for x in own], 2)]
        more = [
            *learnt,
            spread([one["rule"] for one in own], 2),
            spread([one["words"] for one in own], 1),
            spread([one["distinct"] for one in own], 2),
        ]
        rows.append([name, str(own[0].get("number", "")), rate, *more, *cells])
    header = ["trained on", "rows", "beats the base"]
    header += [] if task.judge.startswith("rule:") else ["judge's reward"]
    header += [f"{task.name} words in 100", "words", "distinct word pairs", *accuracies]
    return table(header, rows)


def main() -> None:
    """Collect, train and measure what is missing, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("task", choices=tuple(TASKS))
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--model", help="folder of the base model")
    flags.add_argument("--output", type=Path, default=Path("runs/collection"))
    given = flags.parse_args()
    enable_compilation_cache()
    each: list[dict[str, Any]] = []
    statistics, names, task = [], ["base"], None
    for seed in given.seeds:
        folder = given.output / given.task / f"seed_{seed}"
        task = TASKS[given.task](seed, folder, given.model)
        judge = make_annotator(task.judge)
        rows, found = gathered(task, folder, seed)
        statistics.append(found)
        names += [name for name in rows if name not in names]
        base = measured(task, task.model, folder / "base.json", seed)
        each.append({"base": scored(task, base, base, judge)})
        for name, own in rows.items():
            if len(own) < FEWEST:
                print(f"seed {seed}, {name}: {len(own)} rows are too few to train on")
                continue
            data = write_rows(folder / "data" / f"{slug(name)}.jsonl", own)
            run = finished(training(task, slug(name), data, seed, folder))
            what = measured(task, run / "export", run / "measured.json", seed)
            each[-1][name] = scored(task, what, base, judge) | {"number": len(own)}
    assert task is not None
    seeds = " ".join(map(str, given.seeds))
    text = (
        f"`python -m experiments.data_collection.compare {given.task} --seeds {seeds}` printed:\n\n"
        f"{yields(statistics)}\n{rows_of_table(task, each, names)}"
    )
    print(text)
    put(FOLDER, given.task, text)


if __name__ == "__main__":
    main()
