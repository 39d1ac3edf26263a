"""What data is collected for: two tasks, one whose reward is a rule and one whose is learnt."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.data_collection import rules
from experiments.runs import DATA, TINY, finished
from jaxalign.backends import BackendOptions, Decoding
from jaxalign.collection import (
    BestOfN,
    Constitutional,
    Method,
    SelfAlignment,
    SimulatedSociety,
    collect,
)
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.files import write_json_lines

FOLDER = Path(__file__).parent
STORIES = DATA / "models" / "stories260K"
PAIRS = DATA / "preferences" / "rasbt_instruction_preference.jsonl"
HARMLESS = DATA / "preferences" / "hh_harmless_base_test.jsonl"
LONGEST = 240
"""Characters of a person's prompt and of each of the two responses."""
SHORTEST = 4
NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Mia", "Tim", "Anna", "Jack", "Lucy", "Bob", "Kate")
PLACES = ("park", "garden", "house", "forest", "school", "shop", "farm", "zoo")
THINGS = ("ball", "dog", "hat", "cake", "book", "box")
Pair = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, prompts, and who says what is better."""

    name: str
    model: str
    prompts: Sequence[str]
    held_out: Sequence[str]
    prompt_format: str
    """Around a prompt, up to the response."""
    annotator: str
    """Of the samples, as `jaxalign collect` names it."""
    judge: str
    """Of what the trained models write."""
    rule: Callable[[str, str], float]
    labelled: Mapping[str, Sequence[Pair]]
    """Pairs to train on that were not collected, by name."""
    pairs: Mapping[str, Sequence[Pair]]
    """Held-out pairs, by name."""
    methods: Mapping[str, Method]
    """Methods of collecting, by name."""
    stops: Sequence[str] = ()
    max_tokens: int = 40


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return list(map(json.loads, file))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, rows)
    return path


def _methods(task: str, annotator: str, number: int, beta: float) -> dict[str, Method]:
    """Every method of collecting, for so many prompts."""
    sampled = BestOfN(annotator=annotator, samples=8)
    principles, rule_file = (FOLDER / f"{name}_{task}.json" for name in ("principles", "rules"))
    return {
        "best and worst of 8": sampled,
        "RSO: 4 of 8 accepted": replace(sampled, select="rso", beta=beta),
        "RAFT: best of 8 (SFT)": replace(sampled, select="raft", keep=0.125),
        "critique and revision": Constitutional(principles=principles, revisions=2, keep_cut=True),
        "self-alignment by rules": SelfAlignment(rules=rule_file),
        "society of 9": SimulatedSociety(ratings="scored", rounds=math.ceil(number / 9)),
    }


def people() -> list[Pair]:
    """Human preferences with one short request (HH-RLHF, harmless)."""
    found = []
    for row in rows_of(HARMLESS):
        prompt = row["prompt"].strip().removeprefix("Human:").removesuffix("Assistant:").strip()
        sides = row["chosen"].strip(), row["rejected"].strip()
        lengths = len(prompt), *map(len, sides)
        if "Human:" not in prompt and max(lengths) <= LONGEST and min(lengths) >= SHORTEST:
            found.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return found


def glad(seed: int, folder: Path, model: str | None = None) -> Task:
    """Stories go on gladly: a rule is the reward, and nothing about it has to be learnt.

    Names in the held-out beginnings are in no other; pairs of the base model's own samples there,
    as the rule has them, are the held-out pairs.
    """
    known, fresh = (
        [
            f"One day, {name} went to the {place} with a {thing}."
            for name, place, thing in itertools.product(names, PLACES, THINGS)
        ]
        for names in (NAMES[:9], NAMES[9:])
    )
    annotator = f"rule:{FOLDER / 'rules.py'}:glad"
    task = Task(
        name="glad",
        model=model or str(STORIES),
        prompts=known,
        held_out=fresh,
        prompt_format="{prompt} ",
        annotator=annotator,
        judge=annotator,
        rule=rules.glad,
        labelled={"people's (HH-RLHF, harmless)": people()},
        pairs={},
        methods=_methods("glad", annotator, len(known), beta=5.0),
    )
    pairs = collected(task, folder / "held_out", task.methods["best and worst of 8"], fresh, seed)
    own = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs]
    return replace(task, pairs={"by the rule": own})


def polite(seed: int, folder: Path, model: str | None = None) -> Task:
    """Requests are answered politely: two reward models, one to collect with and one to judge.

    The pairs with short polite and impolite answers come in four parts: for the reward model that
    labels, for the one that judges, to train on, and to be tested on.
    """
    every = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows_of(PAIRS)
    ]
    every = [row for row in every if all(len(text) <= LONGEST for text in row.values())]
    ends = [round(len(every) * share) for share in (0.3, 0.55, 0.85)]
    labels, judged, own, test = (
        every[begin:end] for begin, end in zip([0, *ends], [*ends, len(every)], strict=True)
    )
    human = people()
    base = model or TINY
    reward, judge = (
        finished(_reward(base, name, write_rows(folder.parent / f"{name}.jsonl", rows)))
        for name, rows in (("reward", labels), ("judge", judged))
    )
    prompts = list(dict.fromkeys(row["prompt"] for row in own))
    annotator = f"reward:{reward}"
    return Task(
        name="polite",
        model=base,
        prompts=prompts,
        held_out=list(dict.fromkeys(row["prompt"] for row in test)),
        prompt_format="Human: {prompt}\n\nAssistant: ",
        annotator=annotator,
        judge=f"reward:{judge}",
        rule=rules.polite,
        labelled={
            "labelled, on the same prompts": own,
            "people's (HH-RLHF, harmless)": human[: len(human) // 2],
        },
        pairs={"labelled": test, "people's": human[len(human) // 2 :]},
        methods=_methods("polite", annotator, len(prompts), beta=1.0),
        stops=("\n\nHuman:", "\n\nAssistant:"),
        max_tokens=48,
    )


TASKS: dict[str, Callable[..., Task]] = {"glad": glad, "polite": polite}


def _reward(model: str, name: str, data: Path) -> TrainConfig:
    rule = OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=5)
    return TrainConfig(
        name=f"collection_{name}",
        model=model,
        data=str(data),
        holdout=0.1,
        prompt_format="Human: {prompt}\n\nAssistant: ",
        max_length=160,
        preference=PreferenceConfig(
            steps=60, batch_size=16, optimizer=rule, eval_every=60, loss="bradley_terry"
        ),
    )


def collected(
    task: Task, folder: Path, method: Method, prompts: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """The pairs of a method, with their responses stripped for training; collected once."""
    source = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    if not (folder / "statistics.json").is_file():
        layout = task.prompt_format.rstrip() if isinstance(method, BestOfN) else "{prompt}"
        collect(
            method,
            model=task.model,
            prompts=str(source),
            folder=folder,
            decoding=Decoding(
                max_tokens=task.max_tokens, temperature=1.0, stop=tuple(task.stops), seed=seed
            ),
            options=BackendOptions(batch_size=32, prompt_format=layout),
        )
    return [
        row | {"chosen": row["chosen"].strip(), "rejected": row["rejected"].strip()}
        for row in rows_of(folder / "pairs.jsonl")
    ]
