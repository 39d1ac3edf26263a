r"""The reward of a response: the mean of criteria's scores, the criteria chosen for its query.

.. math:: r(x, y) = \frac{1}{|C_x|} \sum_{c \in C_x} s_c(x, y), \qquad s_c \in \{1, \ldots, 5\}
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxalign.backends import Backend
from jaxalign.backends.structured import MalformedError, StructuredClient, text_field
from jaxalign.evaluation.criteria import CRITERIA
from jaxalign.evaluation.rules import called

FEWEST, MOST = 2, 5
"""Criteria of a query; the paper's."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluator says of a response."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """By criterion, from 1 to 5."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    why_these: str = ""
    """Why these criteria."""
    failure: str = ""
    """Why there are no scores."""

    @property
    def mean(self) -> float:
        """The reward; NaN without scores, which is not a low one."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else math.nan


@runtime_checkable
class Reward(Protocol):
    """Evaluates responses."""

    def __call__(self, queries: Sequence[str], outputs: Sequence[str]) -> list[Evaluation]: ...


SELECT = """\
A response to the request below will be judged. Choose the criteria that matter for this request,
from {fewest} to {most} of them.

[Request]
{query}

[Criteria]
{pool}

Think of the request's topic, of what its author wants, of what is ambiguous, of the form that an
answer should have, and of what makes it hard. Leave out the criteria that matter less: name no more
than {most}. Reply with one JSON object and nothing else:
{{"reasoning": "one sentence: why these criteria", "criteria": ["Name", "Name", "Name"]}}
"""
EVALUATE = """\
You judge a response and owe nothing to its author. Give every criterion below a whole number from
1 (strongly disagree that the response is good in this) to 5 (strongly agree), with the reason and
what would make it better.

[Request]
{query}

[Response]
{output}

[Criteria]
{criteria}

[Why these criteria]
{why}

Reply with one JSON object and nothing else, in this form:
{form}
"""


class AskedReward:
    """An evaluator that writes scores and reasons.

    Args:
      client: the model, at temperature 0.
      criteria: of every query; None: chosen for each one from the pool, and remembered.
      pool: names that may be chosen; another name is a malformed answer.

    References:
      Singla et al. 2024, arXiv:2411.08733, section 3 (dynamic rewarding).
    """

    def __init__(
        self,
        client: StructuredClient,
        *,
        criteria: Sequence[str] | None = None,
        pool: Sequence[str] = tuple(CRITERIA),
    ):
        self.client, self.criteria, self.pool = client, criteria, tuple(pool)
        self._chosen: dict[str, tuple[tuple[str, ...], str]] = {}

    def __call__(self, queries: Sequence[str], outputs: Sequence[str]) -> list[Evaluation]:
        """As in `Reward`."""
        self._choose(queries)
        rows = list(zip(queries, outputs, strict=True))
        found: list[Evaluation] = [Evaluation(failure="no criteria could be chosen")] * len(rows)
        asked = [at for at, (query, _) in enumerate(rows) if query in self._chosen]
        answers = self.client(
            "evaluator",
            [self._question(*rows[at]) for at in asked],
            [self._reader(rows[at][0]) for at in asked],
        )
        for at, some in zip(asked, answers, strict=True):
            found[at] = some[0] if some else Evaluation(failure="the scores could not be read")
        return found

    def _choose(self, queries: Sequence[str]) -> None:
        new = [query for query in dict.fromkeys(queries) if query not in self._chosen]
        if self.criteria is not None:
            self._chosen |= dict.fromkeys(new, (tuple(self.criteria), "they are always these"))
            return
        pool = "\n".join(f"- {name}: {CRITERIA[name].meaning}" for name in self.pool)
        questions = [
            SELECT.format(query=query, pool=pool, fewest=FEWEST, most=MOST) for query in new
        ]
        answers = self.client("selector", questions, [self._choice] * len(new))
        for query, some in zip(new, answers, strict=True):
            if some:
                self._chosen[query] = some[0]

    def _choice(self, fields: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        names = fields.get("criteria")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise MalformedError("criteria is not a list of names")
        if unknown := [name for name in names if name not in self.pool]:
            raise MalformedError(f"{unknown[0]} is none of the criteria")
        names = tuple(dict.fromkeys(names))
        if not FEWEST <= len(names) <= MOST:
            raise MalformedError(f"{len(names)} criteria are not from {FEWEST} to {MOST}")
        return names, text_field(fields, "reasoning")

    def _question(self, query: str, output: str) -> str:
        names, why = self._chosen[query]
        lines = [
            f"- {name}: {known.meaning}; 5: {known.best}; 1: {known.worst}"
            for name, known in ((name, CRITERIA[name]) for name in names)
        ]
        form = json.dumps({name: {"reason": "...", "score": "1 to 5"} for name in names}, indent=1)
        return EVALUATE.format(
            query=query, output=output, criteria="\n".join(lines), why=why, form=form
        )

    def _reader(self, query: str) -> Callable[[Mapping[str, Any]], Evaluation]:
        names, why = self._chosen[query]

        def read(fields: Mapping[str, Any]) -> Evaluation:
            scores, reasons = {}, {}
            for name in names:
                given = fields.get(name)
                if not isinstance(given, Mapping):
                    raise MalformedError(f"{name} is missing")
                scores[name] = whole_score(given.get("score"), name)
                reasons[name] = text_field(given, "reason")
            return Evaluation(scores=scores, reasons=reasons, why_these=why)

        return read


def whole_score(value: Any, name: str) -> float:
    """A score from 1 to 5.

    Raises:
      MalformedError: it is not a whole number in that range.
    """
    text = str(value).strip()
    if isinstance(value, bool) or text not in ("1", "2", "3", "4", "5"):
        raise MalformedError(f"the score of {name} is {text!r}, not a whole number from 1 to 5")
    return float(text)


PLAIN = """\
Request: {query}

Response: {output}

How good is the response, from 1 (bad) to 5 (good)? {name}: it {meaning}.
Score:"""
RELEVANT = """\
Request: {query}

Does it matter for an answer that it {meaning}? Yes or no?
Answer:"""


def expected_scores(backend: Backend, questions: Sequence[str], most: int = 5) -> list[float]:
    r"""What a model that writes nothing would score: the mean over its log-probs of the scores.

    .. math:: s = \frac{\sum_{k=1}^K k\,\pi(k)}{\sum_{k=1}^K \pi(k)}

    Args:
      backend: it has to score texts.
      questions: texts that a score follows.
      most: K, the best score; a single digit.

    Returns:
      One value each; NaN where a question does not fit the model's context.
    """
    prompts = [question for question in questions for _ in range(most)]
    options = [f" {score}" for _ in questions for score in range(1, most + 1)]
    found = np.array([score.log_prob for score in backend.score(prompts, options)])
    found = found.reshape(len(questions), most)
    weights = np.exp(found - found.max(1, initial=-np.inf, keepdims=True))
    return (weights @ np.arange(1.0, most + 1) / weights.sum(1)).tolist()


class ScoredReward:
    """An evaluator that writes nothing: its scores are `expected_scores`.

    For models too small to write what is asked for; there are no reasons. A query's criteria are
    those whose log-odds of yes over no are the largest: all above the mean, from 2 to 5. Where a
    model has no log-prob of either, as an endpoint with few next tokens, it is not chosen.

    Args:
      backend: it has to score texts.
      criteria: of every query; None: chosen.
      pool: names that may be chosen.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        criteria: Sequence[str] | None = None,
        pool: Sequence[str] = tuple(CRITERIA),
    ):
        self.backend, self.criteria, self.pool = backend, criteria, tuple(pool)
        self._chosen: dict[str, tuple[str, ...]] = {}

    def __call__(self, queries: Sequence[str], outputs: Sequence[str]) -> list[Evaluation]:
        """As in `Reward`."""
        rows = list(zip(queries, outputs, strict=True))
        chosen = [self._criteria(query) for query in queries]
        asked = [
            PLAIN.format(query=query, output=output, name=name, meaning=CRITERIA[name].meaning)
            for (query, output), names in zip(rows, chosen, strict=True)
            for name in names
        ]
        values = iter(expected_scores(self.backend, asked))
        found = []
        for names in chosen:
            scores = {name: next(values) for name in names}
            fits = bool(scores) and all(map(math.isfinite, scores.values()))
            found.append(
                Evaluation(scores=scores, why_these="log-odds")
                if fits
                else Evaluation(failure="no log-probs: is it longer than the context?")
            )
        return found

    def _criteria(self, query: str) -> tuple[str, ...]:
        if self.criteria is not None:
            return tuple(self.criteria)
        if query not in self._chosen:
            asked = [
                RELEVANT.format(query=query, meaning=CRITERIA[name].meaning) for name in self.pool
            ]
            prompts = [question for question in asked for _ in range(2)]
            found = self.backend.score(prompts, [" Yes", " No"] * len(asked))
            odds = [
                yes.log_prob - no.log_prob for yes, no in zip(found[::2], found[1::2], strict=True)
            ]
            known = [value for value in odds if math.isfinite(value)]
            if len(known) < FEWEST:
                return ()
            mean = math.fsum(known) / len(known)
            number = min(max(sum(value > mean for value in known), FEWEST), MOST)
            rank = [-value if math.isfinite(value) else math.inf for value in odds]
            order = sorted(range(len(odds)), key=lambda at: (rank[at], at))[:number]
            self._chosen[query] = tuple(self.pool[at] for at in sorted(order))
        return self._chosen[query]


class RuleReward:
    """An evaluator that is a function of (query, response), from 1 to 5.

    Args:
      function: a finite number; anything else is a failure of that evaluation.
      name: of its one criterion.
    """

    def __init__(self, function: Callable[[str, str], float], *, name: str = "rule"):
        self.function, self.name = function, name

    def __call__(self, queries: Sequence[str], outputs: Sequence[str]) -> list[Evaluation]:
        """As in `Reward`."""
        found = []
        for query, output in zip(queries, outputs, strict=True):
            value, reason = called(self.function, query, output)
            scores = {} if reason else {self.name: value}
            found.append(Evaluation(scores=scores, failure=reason))
        return found
