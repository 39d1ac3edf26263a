"""KTO and BCO on single labelled responses, beside DPO on the same responses as pairs.

Command:  python -m experiments.offline.single_responses --model FOLDER [--methods dpo kto]
Time:     on two idle CPU cores about five seconds a step of 16 pairs with 135M parameters
Expect:   the section "single responses" of this folder's README

The data are true and false answers to the questions of TruthfulQA, each with its label. Of every
ten questions one chooses the learning rate and one is for testing. A question's true and false
answers, in the order of the file, make its pairs; what is left over of the more frequent label is
read by the method "kto, all responses" alone. Every finished run is a line of a file, and is not
made again; the run itself is removed then, as it holds two copies of the model.
"""

import itertools
import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.stats import rankdata

import jaxalign
from experiments.page import half_width, put, table
from experiments.runs import DATA, finished
from jaxalign.config import FeedbackConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.files import open_text, write_json_lines

FOLDER = Path(__file__).parent
JUDGED = DATA / "preferences" / "kto_truthfulqa.jsonl"
METHODS = {
    "dpo": "DPO, pairs",
    "kto": "KTO, the same responses",
    "bco": "BCO, the same responses",
    "kto_all": "KTO, all responses",
}
"""Method -> its name in the table."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained on what."""

    model: str
    """Folder, GGUF file or hub name of a chat model."""
    data: Path = JUDGED
    """Labelled responses {prompt, completion, label}."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    rates: tuple[float, ...] = (2e-6, 5e-6, 1e-5, 2e-5)
    """Learning rates, of which the validation questions choose one for each method."""
    seeds: int = 3
    """Runs with the chosen rate."""
    steps: int = 300
    """Updates of each run."""
    pairs: int = 16
    """Pairs in a batch; of single responses twice as many."""
    held_out: int | None = None
    """Largest number of validation and of test pairs; None: all."""
    dtype: str = "float32"
    """Of the computation."""
    scratch: Path = Path("runs/single_responses")
    """Folder of the texts and of the runs while they last."""
    rows: Path = FOLDER / "single_responses.jsonl"
    """File of finished runs."""
    readme: bool = False
    """Whether to write the table to this folder's README."""


def main(options: Options) -> None:
    """Make what is missing, then print the table."""
    texts = write_texts(options)
    base = None
    for name in options.methods:
        for rate in options.rates:
            base = row(options, texts, base, name, rate, seed=0)
        rate = chosen_rate(options, name)
        for seed in range(1, options.seeds):
            base = row(options, texts, base, name, rate, seed=seed)
    text = tables(options)
    print(text)
    if options.readme:
        put(FOLDER, "single responses", text)


# ------------------------------------------------------------------------------ texts


def write_texts(options: Options) -> dict[str, Path]:
    """Files of pairs and of single responses, split by question."""
    by_question: dict[str, dict[bool, list[str]]] = {}
    for line in options.data.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = record["prompt"].removeprefix("Q: ").removesuffix("\nA:")
        answers = by_question.setdefault(question, {True: [], False: []})
        answer = record["completion"].strip()
        if answer and answer not in itertools.chain(*answers.values()):
            answers[record["label"]].append(answer)
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, question in enumerate(sorted(by_question)):
        splits[{8: "validation", 9: "test"}.get(number % 10, "train")].append(question)
    options.scratch.mkdir(parents=True, exist_ok=True)
    files = {}

    def write(name: str, records: Iterable[Mapping[str, Any]]) -> None:
        files[name] = options.scratch / f"{name}.jsonl"
        write_json_lines(files[name], records)

    for name, questions in splits.items():
        pairs = [
            {"prompt": question, "chosen": true, "rejected": false}
            for question in questions
            for true, false in zip(*map(by_question[question].get, (True, False)), strict=False)
        ]
        if name != "train":
            pairs = random.Random(0).sample(pairs, min(options.held_out or len(pairs), len(pairs)))
        write(f"{name}_pairs", pairs)
        write(f"{name}_same", itertools.chain.from_iterable(map(singles, pairs)))
        write(
            f"{name}_all",
            (
                labelled(question, answer, label)
                for question in questions
                for label, answers in by_question[question].items()
                for answer in answers
            ),
        )
    return files


def labelled(question: str, answer: str, label: bool) -> dict[str, Any]:
    """A record of the feedback stage."""
    return {"prompt": question, "response": answer, "label": label}


def singles(pair: Mapping[str, str]) -> list[dict[str, Any]]:
    """Both responses of a pair."""
    return [
        labelled(pair["prompt"], pair["chosen"], True),
        labelled(pair["prompt"], pair["rejected"], False),
    ]


# ------------------------------------------------------------------------------ runs


def run_config(
    options: Options, texts: Mapping[str, Path], name: str, rate: float, seed: int
) -> TrainConfig:
    """The run of a method."""
    rule = OptimizerConfig(learning_rate=rate, schedule="linear", warmup_fraction=0.1)
    common: dict[str, Any] = {"steps": options.steps, "optimizer": rule}
    stages: dict[str, Any] = {}
    if name == "dpo":
        stages["preference"] = PreferenceConfig(loss="dpo", batch_size=options.pairs, **common)
    else:
        which = "all" if name == "kto_all" else "same"
        stages["feedback"] = FeedbackConfig(
            loss=f"{name.removesuffix('_all')}_unpaired",
            data=str(texts[f"train_{which}"]),
            eval_data=str(texts[f"validation_{which}"]),
            batch_size=2 * options.pairs,
            **common,
        )
    return TrainConfig(
        name=f"{name}_{rate:g}_{seed}",
        output=str(options.scratch),
        model=options.model,
        data=str(texts["train_pairs"]),
        eval_data=str(texts["validation_pairs"]),
        max_length=160,
        max_eval_records=64,
        dtype=options.dtype,
        seed=seed,
        **stages,
    )


def row(
    options: Options,
    texts: Mapping[str, Path],
    base: jaxalign.LanguageModel | None,
    name: str,
    rate: float,
    *,
    seed: int,
) -> jaxalign.LanguageModel | None:
    """Make a run and write what it does to held-out questions, if that is not there yet.

    Returns:
      The model from which all runs start, loaded when it is first needed.
    """
    key = {"method": name, "rate": rate, "seed": seed} | size(options)
    if any(key.items() <= one.items() for one in rows(options)):
        return base
    base = base or jaxalign.load(options.model)
    folder = finished(run_config(options, texts, name, rate, seed))
    model = jaxalign.load(folder)
    found = {
        split: measure(model, base, texts[f"{split}_pairs"]) for split in ("validation", "test")
    }
    with open_text(options.rows, "a") as file:
        file.write(json.dumps(key | {"dtype": options.dtype} | found) + "\n")
    shutil.rmtree(folder)
    print(name, f"{rate:g}", seed, found["test"], flush=True)
    return base


def measure(
    model: jaxalign.LanguageModel, base: jaxalign.LanguageModel, pairs: Path
) -> dict[str, float]:
    """Held-out numbers of a trained model: in nats, relative to the first model."""
    found = model.log_probs(str(pairs), reference=base, max_length=160)
    chosen, rejected = (
        np.asarray(x, np.float64) for x in (found.chosen_log_ratio, found.rejected_log_ratio)
    )
    ranks = rankdata(np.concatenate([chosen, rejected]))[: len(chosen)]
    below = ranks.sum() - len(chosen) * (len(chosen) + 1) / 2
    return {
        "pairs": len(chosen),
        "accuracy": float(np.mean((chosen > rejected) + (chosen == rejected) / 2)),
        "auc": float(below / len(chosen) / len(rejected)),
        "true": float(chosen.mean()),
        "false": float(rejected.mean()),
    }


def size(options: Options) -> dict[str, Any]:
    """What else two runs must share to be compared."""
    return {"steps": options.steps, "pairs": options.pairs, "held_out": options.held_out}


def rows(options: Options) -> list[dict[str, Any]]:
    """The finished runs."""
    if not options.rows.exists():
        return []
    return [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]


def chosen_rate(options: Options, name: str) -> float:
    """The rate with the largest accuracy on validation pairs."""
    found = [
        one
        for one in rows(options)
        if ({"method": name, "seed": 0} | size(options)).items() <= one.items()
    ]
    return max(found, key=lambda one: one["validation"]["accuracy"])["rate"]


def tables(options: Options) -> str:
    """All methods with their chosen rates, on the test questions; and the choice."""
    header = ["method", "learning rate", "accuracy of pairs", "AUC", "true", "false"]
    lines, sweep = [], []
    for name in options.methods:
        rate = chosen_rate(options, name)
        own = [x for x in rows(options) if ({"method": name} | size(options)).items() <= x.items()]
        runs = [one["test"] for one in own if one["rate"] == rate]
        values = [
            mean([one[column] for one in runs], form)
            for column, form in (("accuracy", ".3f"), ("auc", ".3f"), ("true", "+.1f"))
        ]
        values.append(mean([one["false"] for one in runs], "+.1f"))
        lines.append([METHODS[name], f"{rate:g}", *values])
        of_rates = {x["rate"]: x["validation"]["accuracy"] for x in own if x["seed"] == 0}
        sweep.append([METHODS[name], *(f"{of_rates[rate]:.3f}" for rate in options.rates)])
    choice = ["validation accuracy at", *(f"{rate:g}" for rate in options.rates)]
    return "\n".join([table(header, lines), table(choice, sweep)])


def mean(values: Sequence[float], form: str) -> str:
    """Mean and 95 % interval over seeds."""
    text = f"{np.mean(values):{form}}"
    return text if len(values) < 2 else f"{text} ± {half_width(values):{form.lstrip('+')}}"


if __name__ == "__main__":
    main(tyro.cli(Options))
