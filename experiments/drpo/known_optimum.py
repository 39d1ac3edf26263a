"""Searches on tasks whose best prompt is known: how often is it found, and at what cost.

A prompt is a set of bullet points; each has a hidden worth, two of them harm each other, and the
reward of an answer is the worth of the prompt that made it plus a query's own noise; or the points
are worth different amounts to different queries, and the best set has the largest mean. The best
set is found by trying all.

Command:  python -m experiments.drpo.known_optimum
Time:     seconds, no model
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.page import put, table
from jaxalign.prompting import beam_search, greedy_search, monte_carlo, pareto_search

POINTS, DEPTH, ACTIONS = 8, 10, 3
QUERIES, BUDGET = 4, 57
"""Kinds of queries; the rollouts of a beam of two paths."""
CONDITIONS = ({}, {"noise": 0.5}, {"variety": 1.0})


class Sets:
    """A `World` whose states are sets of points, and whose actions toggle one.

    It is also a `ReflectiveWorld`: a mutation toggles one point, drawn like an action.
    """

    def __init__(self, seed: int, noise: float = 0.0, variety: float = 0.0):
        rng = np.random.default_rng(seed)
        self.worth = rng.normal(size=POINTS)
        self.clash = np.triu(
            rng.uniform(-1, 1, (POINTS, POINTS)) * (rng.uniform(size=(8, 8)) < 0.3), 1
        )
        own = rng.normal(size=(QUERIES, POINTS))
        self.own = variety * (own - own.mean(0))  # the mean over queries is `worth`
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
            rewards.append(self.reward(state, path[-1].depth))
        return list(zip(states, rewards, strict=True))

    def reward(self, state: tuple[int, ...], query: int) -> float:
        self.tried += 1
        noise = np.random.default_rng([self.seed, query, sum(2**p for p in state)]).normal()
        own = float(self.own[query % QUERIES, list(state)].sum())
        return self.value(state) + own + self.noise * float(noise)

    def first(self) -> tuple[int, ...]:
        return ()

    def rollouts(self, pairs: Any) -> list[tuple[Any, float]]:
        rewards = [self.reward(state, query) for state, query in pairs]
        return list(zip(pairs, rewards, strict=True))

    def reflect(self, candidate: tuple[int, ...], traces: Any) -> tuple[int, ...]:
        del traces
        rng = np.random.default_rng([self.seed, self.tried, sum(2**p for p in candidate)])
        return tuple(sorted({*candidate} ^ {int(rng.integers(POINTS))}))

    def regret(self, points: tuple[int, ...]) -> float:
        """Distance to the best set, as a share of the span between best and worst."""
        sizes = range(POINTS + 1)
        every = [self.value(s) for n in sizes for s in itertools.combinations(range(POINTS), n)]
        best = max(every)
        return (best - self.value(points)) / (best - min(every))


class Reflecting(Sets):
    """Its feedback names the point of the minibatch's queries that is most worth toggling."""

    def reflect(self, candidate: tuple[int, ...], traces: Any) -> tuple[int, ...]:
        kinds = [query % QUERIES for _, query in traces]
        toggled = [tuple(sorted({*candidate} ^ {point})) for point in range(POINTS)]
        own = self.own[kinds].mean(0)
        return max(toggled, key=lambda one: self.value(one) + own[list(one)].sum())


def evolve(world: Sets, minibatch: int = 1) -> tuple[int, ...]:
    """The set that GEPA finds."""
    found = pareto_search(
        world,
        pareto=range(QUERIES),
        feedback=range(QUERIES, 3 * QUERIES),
        budget=BUDGET,
        minibatch=minibatch,
        seed=world.seed,
    )
    return found.candidates[found.best].candidate


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
EVOLUTIONS = {
    "GEPA, blind mutation": Sets,
    "GEPA, feedback names a point": Reflecting,
}


def chosen(name: str, seed: int, **condition: float) -> tuple[Sets, tuple[int, ...]]:
    """A task, and the set that a search finds."""
    if name in EVOLUTIONS:
        world = EVOLUTIONS[name](seed, **condition)
        return world, evolve(world)
    world = Sets(seed, **condition)
    found = SEARCHES[name](world)
    return world, found.nodes[found.best].state


def main(number: int = 200) -> None:
    """Write the table: regret of each search, mean over tasks, under each condition."""
    rows = []
    for name in (*SEARCHES, *EVOLUTIONS):
        cells, tried = [], 0.0
        for condition in CONDITIONS:
            regrets = []
            for seed in range(number):
                world, points = chosen(name, seed, **condition)
                regrets.append(world.regret(points))
                tried += world.tried / (len(CONDITIONS) * number)
            mean = float(np.mean(regrets))
            error = 1.96 * float(np.std(regrets)) / number**0.5
            cells += [f"{mean:.3f} ± {error:.3f}", f"{np.mean(np.array(regrets) < 1e-9):.2f}"]
        rows.append([name, f"{tried:.0f}", *cells])
    kinds = ("", ", noise", ", variety")
    header = [f"{what}{kind}" for kind in kinds for what in ("regret", "found")]
    text = table(["search", "prompts tried", *header], rows)
    print(text)
    put(Path(__file__).parent, "known_optimum", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
