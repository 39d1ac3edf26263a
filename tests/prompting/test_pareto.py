"""GEPA: Pareto selection on tables, and searches whose best candidate is known."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from jaxalign.backends import Decoding
from jaxalign.backends.structured import StructuredClient
from jaxalign.errors import UserError
from jaxalign.prompting import (
    AskedReflector,
    Evaluation,
    Example,
    PromptSearch,
    optimize_prompt,
    pareto_search,
    pareto_wins,
)
from jaxalign.prompting.pareto import most_mutations, winners
from jaxalign.prompting.system_prompts import PromptState
from tests.backends.scripted import Scripted

NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "wins"),
    [
        ([[1, 1, 1]], {0: 3}),
        ([[3, 1, 1], [1, 3, 1], [2, 2, 2]], {0: 1, 1: 1, 2: 1}),  # each is best on one
        ([[2, 2, 2], [3, 1, 1], [1, 1, 0]], {0: 2, 1: 1}),  # the last is best on none
        # The paper's example: the second matches the first where that is best, and wins more.
        ([[3, 0, 0], [3, 2, 0], [0, 0, 1]], {1: 2, 2: 1}),
        ([[2, 2, 0], [2, 2, 1], [0, 0, 5]], {1: 2, 2: 1}),  # the same wins: the larger mean
        ([[2, 2], [2, 2]], {0: 2}),  # equal candidates: the first
        # Covered by two others together, but by neither alone: on the front (not when released).
        ([[5, 5, 0, 0], [5, 0, 5, 0], [0, 5, 0, 5]], {0: 2, 1: 2, 2: 2}),
        ([[NAN, 1, 1], [0, NAN, NAN]], {0: 2, 1: 1}),  # a missing score wins nothing
        ([[NAN, 1], [NAN, 0]], {0: 1}),
    ],
)
def test_wins_of_hand_made_tables(scores, wins):
    assert pareto_wins(np.array(scores, float)) == wins


def test_the_front_of_random_tables_is_that_of_the_definition(rng):
    for _ in range(50):
        scores = rng.integers(0, 4, (6, 5)).astype(float)
        best = [set(np.flatnonzero(column == column.max())) for column in scores.T]
        assert [set(front) for front in winners(scores)] == best
        wins = {n: {q for q in range(5) if n in best[q]} for n in range(6)}
        front = pareto_wins(scores)
        for number in range(6):
            if number in front:
                assert front[number] == len(wins[number]) > 0
                assert not any(wins[number] < wins[other] for other in range(6))
            elif wins[number]:
                assert any(wins[number] <= wins[other] for other in front if other != number)
        assert set().union(*(wins[number] for number in front)) == set(range(5))


class Bits:
    """A candidate is a row of bits; each query is right with its own bits."""

    def __init__(self, wanted, seed=0):
        self.wanted, self.rng = wanted, np.random.default_rng(seed)
        self.made, self.read = [], 0

    def first(self):
        return (0,) * len(self.wanted[0])

    def rollouts(self, pairs):
        self.made += pairs
        return [((bits, query), float(self.score(bits, query))) for bits, query in pairs]

    def score(self, bits, query):
        return sum(a == b for a, b in zip(bits, self.wanted[query], strict=True) if b is not None)

    def reflect(self, candidate, traces):
        """The feedback names a wrong bit."""
        self.read += 1
        assert all(bits == candidate for bits, _ in traces)
        wrong = [
            (at, wanted)
            for _, query in traces
            for at, wanted in enumerate(self.wanted[query])
            if wanted is not None and candidate[at] != wanted
        ]
        if not wrong:
            return None
        at, wanted = wrong[self.rng.integers(len(wrong))]
        return (*candidate[:at], wanted, *candidate[at + 1 :])


WANTED = [
    (1, 1, None, None, 0),
    (None, 1, 1, None, 0),
    (None, None, 1, 1, 0),
    (1, None, None, 1, 0),
]
SIZES = {"pareto": range(4), "feedback": range(4), "minibatch": 2}


@pytest.mark.parametrize("seed", range(5))
def test_the_known_optimum_is_found_within_the_budget(seed):
    world = Bits(WANTED, seed)
    found = pareto_search(world, budget=60, seed=seed, **SIZES)
    assert found.candidates[found.best].candidate == (1, 1, 1, 1, 0)
    assert found.spent == len(world.made) <= 60
    assert max(Counter(world.made).values()) == 1  # no rollout is made twice
    assert world.read == found.mutations <= most_mutations(60, 4, 2)


@pytest.mark.parametrize("budget", [12, 13, 20, 31])
def test_every_accepted_candidate_is_scored_on_all_queries_and_the_budget_is_kept(budget):
    world = Bits(WANTED)
    found = pareto_search(world, budget=budget, **SIZES)
    assert len(world.made) == found.spent <= budget
    for one in found.candidates:
        assert one.scores == tuple(world.score(one.candidate, query) for query in range(4))
        if one.parent is not None:
            assert one.mean > found.candidates[0].mean or one.parent > 0
    means = [found.candidates[number].mean for number in found.best_first]
    assert means == sorted(means, reverse=True)


def test_a_child_that_is_not_better_on_the_minibatch_is_not_accepted():
    class Stubborn(Bits):
        def reflect(self, candidate, traces):
            self.read += 1
            return tuple(1 - bit for bit in candidate) if self.read == 1 else None

    world = Stubborn([(0, 0), (1, 1)])  # the child is worse on one query and better on the other
    found = pareto_search(world, pareto=[0, 1], feedback=[0], budget=20, minibatch=1)
    assert [one.candidate for one in found.candidates] == [(0, 0)]
    world = Stubborn([(0, 0), (1, 1)])
    found = pareto_search(world, pareto=[0, 1], feedback=[1], budget=20, minibatch=1)
    assert [one.candidate for one in found.candidates] == [(0, 0), (1, 1)]
    assert pareto_wins(np.array([one.scores for one in found.candidates])) == {0: 1, 1: 1}


def test_parents_are_drawn_in_proportion_to_their_wins():
    parents = Counter()

    class Counting(Bits):
        def reflect(self, candidate, traces):
            if candidate == (0,):
                parents["first"] += 1
                return (1,)
            parents["second"] += 1
            return None

    for seed in range(100):  # the second wins three of four queries
        world = Counting([(0,), (1,), (1,), (1,)])
        pareto_search(world, pareto=range(4), feedback=[1], budget=60, minibatch=1, seed=seed)
    total = parents.total() - 100  # the first mutation of each has one parent
    assert abs(parents["second"] / total - 0.75) < 0.05


def test_full_marks_are_not_mutated_and_missing_scores_do_not_count():
    world = Bits([(0, 0)])
    found = pareto_search(world, pareto=[0], feedback=[0], budget=9, minibatch=1, perfect=2.0)
    assert (world.read, found.spent) == (0, 1)

    class Unreadable(Bits):
        def score(self, bits, query):
            return NAN if sum(bits) else super().score(bits, query)

    found = pareto_search(Unreadable(WANTED), budget=40, **SIZES)
    assert len(found.candidates) == 1

    class Silent(Bits):
        def score(self, bits, query):
            return NAN

    with pytest.raises(UserError, match="no score on any query"):
        pareto_search(Silent(WANTED), budget=40, **SIZES)


def test_sizes_are_checked():
    with pytest.raises(UserError, match=r"budget: 11 rollouts do not suffice .* 12 are needed"):
        pareto_search(Bits(WANTED), budget=11, **SIZES)
    with pytest.raises(UserError, match="minibatch: 0 is not positive"):
        pareto_search(Bits(WANTED), pareto=[0], feedback=[], budget=9)


def test_the_reflector_reads_every_attempt_of_the_minibatch():
    seen = []

    def answer(text, sample):
        seen.append(text)
        return json.dumps({"new_system_prompt": "Better."})

    client = StructuredClient(Scripted(answer), Decoding(max_tokens=64))
    attempts = [
        PromptState(
            prompt="Help.",
            query=f"query {n}",
            output=f"output {n}",
            evaluation=Evaluation(scores={"Depth": 2.0}, reasons={"Depth": f"reason {n}"}),
        )
        for n in range(3)
    ]
    assert AskedReflector(client)([attempts], 1) == [["Better."]]
    words = [
        f"{what} {n}" for what, n in itertools.product(("query", "output", "reason"), range(3))
    ]
    assert all(word in seen[0] for word in ["Help.", *words])


def test_a_search_is_resumed_without_requests(tmp_path, monkeypatch):
    (tmp_path / "bank.txt").write_text("shout\nrhyme\nbe brief\nbe kind\n")
    (tmp_path / "rules.py").write_text(
        "def rhymes(query, response):\n    return 5.0 if 'rhyme' in response else 1.0\n"
    )

    def obeys(text, sample):
        return "; ".join(line[2:] for line in text.splitlines() if line.startswith("- ")) or "none"

    monkeypatch.setattr("jaxalign.prompting.drpo.make_backend", lambda *_: Scripted(obeys))
    search = PromptSearch(
        model="m",
        evaluator=f"rule:{tmp_path / 'rules.py'}:rhymes",
        optimizer=f"bank:{tmp_path / 'bank.txt'}",
        search="gepa",
        budget=60,
        pareto_queries=3,
        minibatch=2,
        depth=6,
        more_depth=0,
        validate=2,
        first_prompt="Help.",
    )
    queries = [f"query {number}" for number in range(search.queries)]
    seeds = [Example(query="a", response="b")]
    first = optimize_prompt(search, seeds, queries, tmp_path)
    assert "- rhyme" in first.artefact.system_prompt
    nodes = [json.loads(line) for line in (tmp_path / "tree.jsonl").read_text().splitlines()]
    assert nodes[0]["reward"] == 1.0
    assert nodes[first.search.best]["reward"] == 5.0
    assert (tmp_path / "index.html").exists()
    most = search.most_calls(1)
    assert most["model"] == 60 + 2 * 3
    [line] = [line for line in first.facts if line.startswith("new requests")]
    assert 0 < int(line.split()[2]) <= most["model"]
    again = optimize_prompt(search, seeds, queries, tmp_path)
    assert "new requests: 0 of m" in again.facts
    assert again.artefact == first.artefact
    with pytest.raises(UserError, match="none is left for minibatches"):
        optimize_prompt(search, seeds, queries[:5], tmp_path)
