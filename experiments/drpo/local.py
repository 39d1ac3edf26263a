"""The whole system on a local model: no prompt, constant examples, and what the searches find.

The model has read nothing but stories, so that prompts are prose: the marks of instructions and
queries are unknown to it. The reward is a rule that needs no judge: how many glad words an answer
of 24 tokens holds.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.backends import Cached, Decoding
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.local import LocalModel
from jaxalign.backends.words import WordVectors
from jaxalign.commands.report import print_table
from jaxalign.prompting import (
    BankOptimizer,
    Composer,
    Example,
    RuleReward,
    SystemPromptWorld,
    beam_search,
    greedy_search,
    monte_carlo,
)

DATA = Path(os.environ.get("JAXALIGN_SHARED", "../shared")) / "data"
GLAD = re.compile(r"\b(happy|smil\w*|laugh\w*|love\w*|fun|hug\w*|play\w*|friend\w*|good|nice)\b")
FIRST = "Here is a little story."
BANK = [
    "Everyone was happy.",
    "They laughed and played.",
    "It was a sad and dark day.",
    "The dog was big.",
    "They were good friends and had fun.",
    "It began to rain.",
    "She smiled and gave him a hug.",
    "He lost his ball.",
]
EXAMPLES = [
    Example(query="One day, Sam", response="played with his friend Joe. They were happy."),
    Example(query="Then Amy", response="saw a nice cat. She smiled and they played."),
    Example(query="In the park, Joe", response="had fun with his mom. He gave her a hug."),
]
NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Mia", "Tim", "Anna")
NAMES += ("Jack", "Lucy", "Bob", "Kate", "Sara", "Fred", "Jane", "Pip")
BEGINNINGS = ("One day, {}", "Then {}", "In the park, {}", "After lunch, {}")


class Prose(Composer):
    """Sentences one after the other: prompt, nearest examples, query."""

    @property
    def stops(self) -> tuple[str, ...]:
        """None: the length ends an answer."""
        return ()

    def prompt(self, system_prompt: str, query: str) -> str:
        """The text that the model goes on with."""
        parts = [line.removeprefix("- ") for line in system_prompt.splitlines()]
        for number in self.nearest(query):
            parts.append(f"{self.examples[number].query} {self.examples[number].response}")
        return " ".join([*filter(None, parts), query])


def glad(query: str, response: str) -> float:
    """1 to 5: one point more for each glad word, up to four."""
    del query
    return 1.0 + min(len(GLAD.findall(response.lower())), 4)


def queries() -> list[str]:
    """Sixty-four beginnings."""
    return [beginning.format(name) for beginning in BEGINNINGS for name in NAMES]


def main(folder: str = "runs/drpo_local") -> None:
    """Print the table of mean rewards on questions that no search has seen."""
    model = Cached(
        LocalModel.load(DATA / "models" / "stories260K", batch_size=16),
        AnswerFile(Path(folder) / "answers.jsonl"),
    )
    reward, decoding = RuleReward(glad), Decoding(max_tokens=24)
    every = [queries()[at] for at in np.random.default_rng(0).permutation(64)]
    searched, fresh = every[:24], every[24:]

    def world(shown: int) -> SystemPromptWorld:
        composer = Prose(EXAMPLES, shown=shown, embedder=WordVectors(), layout="continue")
        optimizer = BankOptimizer(BANK)
        return SystemPromptWorld(
            model, composer, reward, optimizer, searched, decoding, first=FIRST
        )

    def mean(world: SystemPromptWorld, prompt: str) -> tuple[float, float]:
        found = [value for _, value in world.tried([(prompt, query) for query in fresh])]
        return float(np.mean(found)), 1.96 * float(np.std(found)) / len(found) ** 0.5

    rows = [["no prompt", "0", *_cells(mean(world(0), ""))]]
    for shown in range(4):
        rows.append([f"first prompt, K {shown}", "0", *_cells(mean(world(shown), FIRST))])
    searches: dict[str, Any] = {
        "greedy": lambda one: greedy_search(one, actions=3, depth=8, more_depth=0),
        "Monte Carlo": lambda one: monte_carlo(one, paths=6, depth=8),
        "beam 2": lambda one: beam_search(one, width=2, actions=3, depth=8, more_depth=0),
    }
    for name, search in searches.items():
        for shown in (0, 2) if name == "beam 2" else (2,):
            one = world(shown)
            found = search(one)
            prompt = found.nodes[found.best].state["prompt"]
            tried = str(len(found.nodes))
            rows.append([f"{name}, K {shown}", tried, *_cells(mean(one, prompt))])
            print(f"{name}, K {shown}: {prompt!r}")
    print_table(["prompt", "states", "mean reward", "95 %"], rows)


def _cells(found: tuple[float, float]) -> list[str]:
    return [f"{found[0]:.3f}", f"± {found[1]:.3f}"]


if __name__ == "__main__":
    main(*sys.argv[1:])
