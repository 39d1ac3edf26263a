"""The paper's ablations on a local model that has read transcripts: it answers and scores itself.

It cannot write a prompt or a judgement: edits come from a bank, and scores are read off its
log-probs. A reward model that the search does not know measures the same answers.

Command:  python -m experiments.drpo.ablations [--model FOLDER] [--seeds 4] [--reward FOLDER]
Needs:    the base model of experiments/base_lm; the reward model of experiments/judging
Time:     about an hour on two CPU cores; answers and scores are kept
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.drpo.stories import SEARCHES, interval
from experiments.page import put, table
from experiments.runs import DATA, TINY
from jaxalign.backends import Cached, Decoding
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.local import LocalModel
from jaxalign.backends.words import WordVectors
from jaxalign.evaluation.reward_models import RewardModel
from jaxalign.prompting import (
    FIXED,
    BankOptimizer,
    Composer,
    Example,
    ScoredReward,
    SystemPromptWorld,
)

FOLDER = Path(__file__).parent
FIRST = "You are a helpful assistant."
BANK = (
    "Answer politely.",
    "Answer in one short sentence.",
    "Give a reason.",
    "Give an example.",
    "Say so if you are not sure.",
    "Begin with the answer itself.",
    "Explain every step.",
    "Do not answer what would hurt somebody.",
    "Use plain words.",
    "Ask back if the question is not clear.",
    "Write as a friend would.",
    "List the points one by one.",
)
"""A seed's bank is eight of these."""
LONGEST = 160
"""Characters of a query, and of an example with its answer."""
SEARCHED, HELD_OUT, EXAMPLES = 9, 40, 16


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    name: str
    shown: int = 2
    """Examples."""
    retrieved: bool = True
    """The nearest of 16; else always the same."""
    search: str | None = None
    dynamic: bool = True
    """Criteria chosen for each query."""
    first: str = FIRST


VARIANTS = (
    Variant(name="bare model", shown=0, first=""),
    Variant(name="first prompt", shown=0),
    Variant(name="first prompt, 3 constant examples (URIAL's way)", shown=3, retrieved=False),
    Variant(name="first prompt, 2 nearest examples"),
    Variant(name="beam 2, dynamic reward, 2 examples (DRPO)", search="beam 2"),
    Variant(name="the same, fixed reward", search="beam 2", dynamic=False),
    Variant(name="the same, greedy", search="greedy"),
    Variant(name="the same, Monte Carlo", search="Monte Carlo"),
    Variant(name="the same, no example", search="beam 2", shown=0),
    Variant(name="the same, 1 example", search="beam 2", shown=1),
    Variant(name="the same, 3 examples", search="beam 2", shown=3),
)


def queries() -> list[str]:
    """The short ones among the released queries of DRPO."""
    folder = DATA / "drpo"
    alpaca = json.loads((folder / "alpaca_train.json").read_text(encoding="utf-8"))
    lima = json.loads((folder / "lima_subsample_train.json").read_text(encoding="utf-8"))
    every = [row["instruction"] for row in alpaca] + [row["query"] for row in lima]
    return [text.strip() for text in dict.fromkeys(every) if len(text.strip()) <= LONGEST]


def examples() -> list[Example]:
    """The first sixteen short ones among people's seed tasks, none of which the model has read."""
    found = []
    with (DATA / "sft" / "sft_self_instruct_seeds.jsonl").open(encoding="utf-8") as file:
        for fields in map(json.loads, file):
            if 40 <= len(fields["prompt"]) + len(fields["response"]) <= LONGEST:
                found.append(Example(query=fields["prompt"], response=fields["response"]))
    return found[:EXAMPLES]


class Bench:
    """A model with its rewards, and everything that a seed decides.

    Args:
      model: answers and scores.
      reward_model: measures the answers, too.
    """

    def __init__(self, model: Cached, reward_model: RewardModel):
        self.model, self.reward_model = model, reward_model
        self.rewards = {
            True: ScoredReward(model),
            False: ScoredReward(model, criteria=FIXED),
        }
        self.chosen: Counter[str] = Counter()

    def world(self, one: Variant, seed: int) -> tuple[SystemPromptWorld, list[str]]:
        """What a variant searches with a seed, and the queries that it does not see."""
        rng = np.random.default_rng(seed)
        every = queries()
        every = [every[at] for at in rng.permutation(len(every))]
        bank = [BANK[at] for at in rng.permutation(len(BANK))[:8]]
        known = examples() if one.retrieved else examples()[: one.shown]
        composer = Composer(known, shown=one.shown, embedder=WordVectors(), layout="transcript")
        world = SystemPromptWorld(
            self.model,
            composer,
            self.rewards[one.dynamic],
            BankOptimizer(bank, seed=seed),
            every[:SEARCHED],
            Decoding(max_tokens=40),
            first=one.first,
        )
        return world, every[SEARCHED : SEARCHED + HELD_OUT]

    def row(self, one: Variant, seed: int) -> dict[str, float]:
        """The measures of a variant with a seed."""
        world, fresh = self.world(one, seed)
        prompt, climbed = one.first, float("nan")
        if one.search is not None:
            found = SEARCHES[one.search](world)
            best = found.nodes[found.best]
            prompt, climbed = best.state["prompt"], best.value
            print(f"seed {seed}, {one.name}: {prompt!r}", flush=True)
        tried = [state for state, _ in world.tried([(prompt, text) for text in fresh])]
        outputs = [state["output"] for state in tried]
        dynamic = self.rewards[True](fresh, outputs)
        fixed = self.rewards[False](fresh, outputs)
        self.chosen.update(name for found in dynamic for name in found.scores)
        return {
            "path": climbed,
            "dynamic": float(np.nanmean([found.mean for found in dynamic])),
            "fixed": float(np.nanmean([found.mean for found in fixed])),
            "reward model": float(self.reward_model.rewards(fresh, outputs).mean()),
            "words": float(np.mean([len(text.split()) for text in outputs])),
        }


def main() -> None:
    """Run every variant with every seed, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default=TINY, help="folder of the base model")
    flags.add_argument("--reward", default="runs/judging_reward", help="folder of the reward model")
    flags.add_argument("--seeds", type=int, default=4, help="how many")
    given = flags.parse_args()
    answers = AnswerFile(Path("runs/drpo_ablations/answers.jsonl"))
    model = Cached(LocalModel.load(given.model, batch_size=16), answers)
    bench = Bench(model, RewardModel.load(given.reward))
    found = {one.name: [bench.row(one, seed) for seed in range(given.seeds)] for one in VARIANTS}
    first = found["first prompt"]

    def cells(own: Sequence[dict[str, float]], key: str) -> str:
        gained = [x[key] - y[key] for x, y in zip(own, first, strict=True)]
        return interval(gained, "{:+.3f}")

    rows = []
    for one in VARIANTS:
        own = found[one.name]
        same = one.name == "first prompt"
        more: list[Any] = [
            interval([x[key] for x in own]) if same else cells(own, key)
            for key in ("dynamic", "fixed", "reward model")
        ]
        climbed = interval([x["path"] for x in own]) if one.search else ""
        rows.append([one.name, climbed, *more, f"{np.mean([x['words'] for x in own]):.1f}"])
    header = ["prompt", "best path", "dynamic", "fixed", "reward model", "words"]
    text = table(header, rows)
    total = sum(bench.chosen.values())
    often = ", ".join(f"{name} {n / total:.2f}" for name, n in bench.chosen.most_common(6))
    text += f"\nOf the chosen criteria: {often}.\n"
    command = f"python -m experiments.drpo.ablations --seeds {given.seeds}"
    print(text)
    put(
        FOLDER,
        "ablations",
        f"`{command}` printed (means over seeds with 95 % intervals; all but the second row are "
        f"differences from it):\n\n{text}",
    )


if __name__ == "__main__":
    main()
