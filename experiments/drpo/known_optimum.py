"""Searches on tasks whose best prompt is known: how often is it found, and at what cost.

A prompt is a set of bullet points; each has a hidden worth, two of them harm each other, and the
reward of an answer is the worth of the prompt that made it plus a query's own noise. The best set
is found by trying all.

Command:  python -m experiments.drpo.known_optimum
Time:     seconds, no model
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.page import put, table
from jaxalign.prompting import beam_search, greedy_search, monte_carlo

POINTS, DEPTH, ACTIONS = 8, 10, 3


class Sets:
    """A `World` whose states are sets of points, and whose actions toggle one."""

    def __init__(self, seed: int, noise: float):
        rng = np.random.default_rng(seed)
        self.worth = rng.normal(size=POINTS)
        self.clash = np.triu(
            rng.uniform(-1, 1, (POINTS, POINTS)) * (rng.uniform(size=(8, 8)) < 0.3), 1
        )
        self.noise, self.seed, self.tried = noise, seed, 0

    def value(self, points: tuple[int, ...]) -> float:
        chosen = np.isin(np.arange(POINTS), points)
        return float(self.worth @ chosen + chosen @ self.clash @ chosen)

    def root(self) -> tuple[Any, float]:
        return (), self.value(())

    def satisfied(self, node: Any) -> bool:
        del node
        return False

    def actions(self, paths: Any, number: int) -> list[list[Any]]:
        found = []
        for path in paths:
            rng = np.random.default_rng([self.seed, path[-1].number])
            found.append([int(point) for point in rng.permutation(POINTS)[:number]])
        return found

    def move(self, steps: Any) -> list[tuple[Any, float]]:
        states = [tuple(sorted({*path[-1].state} ^ {point})) for path, point in steps]
        rewards = []
        for (path, _), state in zip(steps, states, strict=True):
            query = np.random.default_rng([self.seed, path[-1].depth, sum(2**p for p in state)])
            rewards.append(self.value(state) + self.noise * float(query.normal()))
        self.tried += len(steps)
        return list(zip(states, rewards, strict=True))

    def regret(self, points: tuple[int, ...]) -> float:
        """Distance to the best set, as a share of the span between best and worst."""
        sizes = range(POINTS + 1)
        every = [self.value(s) for n in sizes for s in itertools.combinations(range(POINTS), n)]
        best = max(every)
        return (best - self.value(points)) / (best - min(every))


SEARCHES = {
    "one random path": lambda world: monte_carlo(world, paths=1, depth=DEPTH),
    "Monte Carlo, 6 paths": lambda world: monte_carlo(world, paths=6, depth=DEPTH, value="last"),
    "greedy": lambda world: greedy_search(world, actions=ACTIONS, depth=DEPTH, more_depth=0),
    "beam 2": lambda world: beam_search(world, width=2, actions=ACTIONS, depth=DEPTH, more_depth=0),
    "beam 2, last reward": lambda world: beam_search(
        world, width=2, actions=ACTIONS, depth=DEPTH, more_depth=0, value="last"
    ),
    "beam 4": lambda world: beam_search(world, width=4, actions=ACTIONS, depth=DEPTH, more_depth=0),
}


def main(number: int = 200) -> None:
    """Write the table: regret of each search, mean over tasks, with and without noise."""
    rows = []
    for name, search in SEARCHES.items():
        cells, tried = [], 0.0
        for noise in (0.0, 0.5):
            regrets = []
            for seed in range(number):
                world = Sets(seed, noise)
                found = search(world)
                regrets.append(world.regret(found.nodes[found.best].state))
                tried += world.tried / (2 * number)
            mean = float(np.mean(regrets))
            error = 1.96 * float(np.std(regrets)) / number**0.5
            cells += [f"{mean:.3f} ± {error:.3f}", f"{np.mean(np.array(regrets) < 1e-9):.2f}"]
        rows.append([name, f"{tried:.0f}", *cells])
    header = ["search", "prompts tried", "regret", "found", "regret, noise", "found, noise"]
    text = table(header, rows)
    print(text)
    put(Path(__file__).parent, "known_optimum", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
