"""Searches on a local model that has read nothing but stories, where a rule is the reward.

Prompts are prose, since the marks of instructions and queries are unknown to it. The reward needs
no judge: how many glad words an answer of 24 tokens holds. A seed is another bank of sentences,
another order of the beginnings and other draws of edits.

Command:  python -m experiments.drpo.stories [--seeds 10]
Time:     about a quarter of an hour on two CPU cores; answers are kept
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.page import half_width, put, table
from experiments.runs import DATA
from jaxalign.backends import Backend, Cached, Decoding
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.local import LocalModel
from jaxalign.backends.words import WordVectors
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

FOLDER = Path(__file__).parent
GLAD = re.compile(r"\b(happy|smil\w*|laugh\w*|love\w*|fun|hug\w*|play\w*|friend\w*|good|nice)\b")
FIRST = "Here is a little story."
SENTENCES = (
    "Everyone was happy.",
    "They laughed and played.",
    "They were good friends and had fun.",
    "She smiled and gave him a hug.",
    "He loved his nice new ball.",
    "It was a fun day.",
    "It was a sad and dark day.",
    "The dog was big.",
    "It began to rain.",
    "He lost his ball.",
    "The car was red.",
    "She was very tired.",
    "They ate bread.",
    "The bird was on the tree.",
    "He did not say a word.",
    "It was cold.",
)
"""A seed's bank is half of these."""
EXAMPLES = [
    Example(query="One day, Sam", response="played with his friend Joe. They were happy."),
    Example(query="Then Amy", response="saw a nice cat. She smiled and they played."),
    Example(query="In the park, Joe", response="had fun with his mom. He gave her a hug."),
]
NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Mia", "Tim", "Anna")
NAMES += ("Jack", "Lucy", "Bob", "Kate", "Sara", "Fred", "Jane", "Pip")
BEGINNINGS = ("One day, {}", "Then {}", "In the park, {}", "After lunch, {}")
SEARCHED = 24
"""Beginnings that a search may use; the others are for the table."""
SIZES: dict[str, int] = {"depth": 8}


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


SEARCHES: dict[str, Callable[[Any], Any]] = {
    "greedy": lambda world: greedy_search(world, actions=3, more_depth=0, **SIZES),
    "Monte Carlo": lambda world: monte_carlo(world, paths=6, **SIZES),
    "beam 2": lambda world: beam_search(world, width=2, actions=3, more_depth=0, **SIZES),
}


def row(model: Backend, seed: int, shown: int, search: str | None) -> tuple[float, int]:
    """Mean reward on beginnings that no search has seen, and states that were tried.

    Args:
      model: who goes on with stories.
      seed: of bank, beginnings and edits.
      shown: examples; -1: no prompt either.
      search: of `SEARCHES`; None: the first prompt.
    """
    rng = np.random.default_rng(seed)
    every = [text.format(name) for text in BEGINNINGS for name in NAMES]
    every = [every[at] for at in rng.permutation(len(every))]
    bank = [SENTENCES[at] for at in rng.permutation(len(SENTENCES))[: len(SENTENCES) // 2]]
    composer = Prose(EXAMPLES, shown=max(shown, 0), embedder=WordVectors(), layout="continue")
    world = SystemPromptWorld(
        model,
        composer,
        RuleReward(glad),
        BankOptimizer(bank, seed=seed),
        every[:SEARCHED],
        Decoding(max_tokens=24),
        first=FIRST,
    )
    prompt, states = "" if shown < 0 else FIRST, 0
    if search is not None:
        found = SEARCHES[search](world)
        prompt, states = found.nodes[found.best].state["prompt"], len(found.nodes)
        print(f"seed {seed}, {search}, K {shown}: {prompt!r}", flush=True)
    rewards = [reward for _, reward in world.tried([(prompt, text) for text in every[SEARCHED:]])]
    return float(np.mean(rewards)), states


def interval(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean and half-width of the 95 % interval over seeds (Student's t)."""
    if len(values) < 2:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} ± {half_width(values):.3f}"


def main() -> None:
    """Search with every seed, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--seeds", type=int, default=10, help="how many")
    given = flags.parse_args()
    model = Cached(
        LocalModel.load(DATA / "models" / "stories260K", batch_size=16),
        AnswerFile(Path("runs/drpo_stories/answers.jsonl")),
    )
    plan: list[tuple[str, int, str | None]] = [("no prompt", -1, None)]
    number = "no example", "1 example", "2 examples", "3 examples"
    plan += [(f"first prompt, {number[shown]}", shown, None) for shown in range(3)]
    plan += [("first prompt, the constant 3 (URIAL's way)", 3, None)]
    plan += [(f"{name}, 2 examples", 2, name) for name in SEARCHES]
    plan += [(f"beam 2, {number[shown]}", shown, "beam 2") for shown in (0, 1, 3)]
    numbers = range(given.seeds)
    found = {name: [row(model, n, shown, search) for n in numbers] for name, shown, search in plan}
    before = {
        shown: [mean for mean, _ in found[name]] for name, shown, search in plan if not search
    }
    rows = []
    for name, shown, search in plan:
        means = [mean for mean, _ in found[name]]
        gained = [mean - first for mean, first in zip(means, before[shown], strict=True)]
        states = f"{np.mean([number for _, number in found[name]]):.0f}" if search else ""
        rows.append([name, states, interval(means), interval(gained, "{:+.3f}") if search else ""])
    text = table(["prompt", "states", "mean reward", "over the first prompt"], rows)
    command = f"python -m experiments.drpo.stories --seeds {given.seeds}"
    print(text)
    put(FOLDER, "stories", f"`{command}` printed (95 % intervals over seeds):\n\n{text}")


if __name__ == "__main__":
    main()
