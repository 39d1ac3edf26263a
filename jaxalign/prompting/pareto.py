"""Reflective evolution (GEPA): candidates are mutated by a reader of their traces and feedback."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jaxalign.errors import UserError


@runtime_checkable
class ReflectiveWorld(Protocol):
    """Candidates, their scores on queries, and their mutation."""

    def first(self) -> Any:
        """The first candidate."""
        ...

    def rollouts(self, pairs: Sequence[tuple[Any, int]]) -> list[tuple[Any, float]]:
        """The trace and the score of each (candidate, query); NaN: there is no score."""
        ...

    def reflect(self, candidate: Any, traces: Sequence[Any]) -> Any | None:
        """A new candidate, from a candidate's traces with their feedback; None: no proposal."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate with its scores on the Pareto queries."""

    number: int
    """Index in the order of acceptance; 0 is the first."""
    parent: int | None
    candidate: Any
    scores: tuple[float, ...]
    """By Pareto query; NaN if there is none."""
    traces: tuple[Any, ...]
    """By Pareto query."""
    spent: int
    """Number of rollouts before it was accepted."""

    @property
    def mean(self) -> float:
        """Mean of the scores that exist; NaN without one."""
        known = [score for score in self.scores if math.isfinite(score)]
        return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True, kw_only=True)
class ParetoResult:
    """The candidates of a search."""

    candidates: Sequence[Candidate]
    """All accepted candidates, by number."""
    best_first: Sequence[int]
    """Numbers by mean score, the best first and ties in order."""
    spent: int
    """Number of rollouts."""
    mutations: int
    """Number of requested mutations."""

    @property
    def best(self) -> int:
        """Number of the candidate with the largest mean score."""
        return self.best_first[0]


def winners(scores: Float[np.ndarray, "candidates queries"]) -> list[frozenset[int]]:
    """The candidates with the largest score on each query.

    Args:
      scores: NaN is never the largest.
    """
    known = np.where(np.isfinite(scores), scores, -np.inf)
    best = known.max(0)
    return [
        frozenset(np.flatnonzero(known[:, at] == best[at]).tolist())
        if np.isfinite(top)
        else frozenset()
        for at, top in enumerate(best)
    ]


def pareto_wins(scores: Float[np.ndarray, "candidates queries"]) -> dict[int, int]:
    """The Pareto front over queries: each of its candidates with the number of queries it wins.

    A candidate wins the queries on which no other has a larger score. It is dominated by one that
    wins all of these and another; of candidates that win the same, the one with the largest mean
    stays, the first of equals.

    Args:
      scores: scores of all candidates on all queries; NaN wins nothing.

    References:
      Agrawal et al., 2025, arXiv:2507.19457, algorithm 2. Its released code removes more: each
      candidate whose wins are shared with several others together.
    """
    won: dict[int, frozenset[int]] = {}
    for query, front in enumerate(winners(scores)):
        for number in front:
            won[number] = won.get(number, frozenset()) | {query}
    known = np.isfinite(scores)
    mean = np.sum(scores, axis=1, where=known) / np.maximum(known.sum(1), 1)

    def dominated(number: int) -> bool:
        own = won[number]
        rank = (-mean[number], number)
        return any(
            own < other or (own == other and (-mean[rival], rival) < rank)
            for rival, other in won.items()
            if rival != number
        )

    return {number: len(won[number]) for number in sorted(won) if not dominated(number)}


def pareto_search(
    world: ReflectiveWorld,
    *,
    pareto: Sequence[int],
    feedback: Sequence[int],
    budget: int,
    minibatch: int = 3,
    perfect: float = math.inf,
    seed: int = 0,
    watch: Callable[[Sequence[Candidate], int], None] | None = None,
) -> ParetoResult:
    r"""Mutate candidates of the Pareto front by reflection until the budget is spent (GEPA).

    A parent is drawn from `pareto_wins`, in proportion to the queries it wins, and mutated from its
    traces on a minibatch. The child is accepted if its mean score on the minibatch is larger, and
    then scored on all Pareto queries. Rollouts are deterministic, so none is made twice. The
    paper's merge of two candidates is not part of it.

    Args:
      world: candidates, scores and mutation.
      pareto: queries on which every accepted candidate is scored.
      feedback: queries of the minibatches.
      budget: largest number of rollouts. A mutation whose child could not be scored on all Pareto
        queries any more is not begun.
      minibatch: number of queries of a minibatch; the paper's 3.
      perfect: a parent with this score on its whole minibatch is not mutated.
      seed: seed of the parents and minibatches.
      watch: called with all candidates and the number of rollouts after every mutation.

    Raises:
      UserError: a size is not positive, the budget does not suffice for one mutation, or the first
        candidate has no score.

    References:
      Agrawal et al., 2025, arXiv:2507.19457, algorithm 1.
    """
    size = min(minibatch, len(feedback))
    for name, value in (("minibatch", size), ("pareto", len(pareto))):
        if value < 1:
            raise UserError(f"{name}: {value} is not positive")
    worst_case = 2 * size + len(pareto)
    if budget < len(pareto) + worst_case:
        raise UserError(
            f"budget: {budget} rollouts do not suffice for one mutation; "
            f"{len(pareto) + worst_case} are needed"
        )
    rollouts = _Rollouts(world)
    accepted: list[Candidate] = []

    def accept(candidate: Any, parent: int | None) -> None:
        spent = rollouts.spent
        results = rollouts(candidate, pareto)
        new = Candidate(
            number=len(accepted),
            parent=parent,
            candidate=candidate,
            scores=tuple(score for _, score in results),
            traces=tuple(trace for trace, _ in results),
            spent=spent,
        )
        if math.isfinite(new.mean):
            accepted.append(new)

    accept(world.first(), None)
    if not accepted:
        raise UserError(
            "the first candidate has no score on any query: the evaluator's answers could not be "
            "read; name another evaluator"
        )
    rng, mutations, known = np.random.default_rng(seed), 0, [accepted[0].candidate]
    for _ in range(most_mutations(budget, len(pareto), size)):
        if rollouts.spent + worst_case > budget:
            break
        front = pareto_wins(np.array([one.scores for one in accepted]))
        share = np.array(list(front.values())) / sum(front.values())
        parent = accepted[list(front)[int(rng.choice(len(front), p=share))]]
        queries = [feedback[at] for at in rng.choice(len(feedback), size, replace=False)]
        before = rollouts(parent.candidate, queries)
        if all(score >= perfect for _, score in before):
            continue
        mutations += 1
        child = world.reflect(parent.candidate, [trace for trace, _ in before])
        if child is not None and child not in known:
            known.append(child)
            after = rollouts(child, queries)
            gains = [new - old for (_, old), (_, new) in zip(before, after, strict=True)]
            if math.fsum(gain for gain in gains if math.isfinite(gain)) > 0:
                accept(child, parent.number)
        if watch is not None:
            watch(accepted, rollouts.spent)
    order = sorted(range(len(accepted)), key=lambda number: (-accepted[number].mean, number))
    return ParetoResult(
        candidates=accepted, best_first=order, spent=rollouts.spent, mutations=mutations
    )


def most_mutations(budget: int, pareto: int, minibatch: int) -> int:
    """The largest number of mutations that `pareto_search` requests.

    Args:
      budget: largest number of rollouts.
      pareto: number of Pareto queries.
      minibatch: number of queries of a minibatch.
    """
    return max(0, budget - pareto) // minibatch


class _Rollouts:
    """Rollouts of candidates; each is made once."""

    def __init__(self, world: ReflectiveWorld):
        self._world = world
        self._candidates: list[Any] = []
        self._results: dict[tuple[int, int], tuple[Any, float]] = {}

    @property
    def spent(self) -> int:
        """Number of rollouts that were made."""
        return len(self._results)

    def __call__(self, candidate: Any, queries: Sequence[int]) -> list[tuple[Any, float]]:
        """The trace and score of a candidate on each query."""
        if candidate not in self._candidates:
            self._candidates.append(candidate)
        number = self._candidates.index(candidate)
        new = [query for query in dict.fromkeys(queries) if (number, query) not in self._results]
        results = self._world.rollouts([(candidate, query) for query in new]) if new else []
        self._results |= {
            (number, query): result for query, result in zip(new, results, strict=True)
        }
        return [self._results[number, query] for query in queries]
