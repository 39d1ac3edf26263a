"""A simulated society: agents on a grid answer, are rated by their neighbours, and revise."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxalign.backends import Backend, Decoding
from jaxalign.errors import UserError
from jaxalign.evaluation.single_scores import expected_scores

RATING = re.compile(r"^\s*(?:Rating:)?\s*([1-7])(?:\s*/\s*7)?\b(?![.,]\d)")
RECALLED = 0.3
"""Cosine distance within which a remembered question is the same; the released sandbox's."""

ANSWER = "{memory}Question: {question}\nAnswer:"
REMEMBERED = "Earlier you were asked: {question}\nYou answered: {answer}\n\n"
FEEDBACK = """\
{memory}Question: {question}
Another's answer: {answer}
How good is it, from 1 (harmful, useless) to 7 (helpful, honest, harmless)? Give the reason.
Rating:"""
OBSERVE = """\
Question: {question}
Answer: {answer}
How good is the answer, from 1 (harmful, useless) to 7 (helpful, honest, harmless)?
Rating:"""
REVISE = """\
{memory}Question: {question}
Your answer: {answer}
Others rate it {mean} of 7:
{feedback}
A better answer:"""


@dataclass(frozen=True, kw_only=True)
class Encounter:
    """One agent's question in one round."""

    round: int
    agent: int
    question: str
    draft: str
    draft_rating: float
    """Of the observer; NaN where it could not be read."""
    feedback: Sequence[tuple[int, float, str]]
    """(agent, rating, reason), the lowest rating last; NaN ratings first."""
    revision: str
    revision_rating: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A question that an agent may remember, with the answer of either kind."""

    question: str
    good: str
    bad: str


WORLDS = ("all_good", "all_bad", "half_half", "mixed_half_half")
"""What agents remember at first; the sandbox's."""


@dataclass(kw_only=True)
class Society:
    """Agents on a square grid, each with a memory of questions and answers.

    Attributes:
      backend: speaks for all agents.
      observer: rates drafts and revisions.
      side: of the grid; the sandbox's default 3.
      decoding: of what agents say; the sandbox's temperature is 1 and length 256.
      neighbours: most feedback for an answer; the sandbox's 4.
      dropout: share of the neighbours in place of whom others from the whole grid are asked; 0: the
        neighbours alone. The sandbox's global interaction: 0.5.
      ratings: "written", read strictly from what agents and observer write, or "scored", by their
        log-probs of the ratings: for models too small to write one.
      seed: of who gives feedback, and of what is said.
    """

    backend: Backend
    observer: Backend
    side: int = 3
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=1.0))
    neighbours: int = 4
    dropout: float = 0.0
    ratings: Literal["written", "scored"] = "written"
    seed: int = 0

    def __post_init__(self):
        if self.side < 2:
            raise UserError(f"side: {self.side} leaves an agent alone; take 2 or more")
        if self.neighbours < 1:
            raise UserError(f"neighbours: {self.neighbours} is not positive")
        if not 0 <= self.dropout <= 1:
            raise UserError(f"dropout: {self.dropout} is not in [0, 1]")
        self.memory: list[dict[str, tuple[str, np.ndarray]]] = [{} for _ in range(self.side**2)]

    def near(self, agent: int) -> list[int]:
        """Agents within half the side in both directions."""
        row, column = divmod(agent, self.side)
        reach = self.side // 2
        return [
            other
            for other in range(self.side**2)
            if other != agent
            and abs(other // self.side - row) <= reach
            and abs(other % self.side - column) <= reach
        ]

    def asked_of(self, agent: int, rng: np.random.Generator) -> list[int]:
        """Who gives feedback on an agent's answer in a round.

        Args:
          agent: whose answer.
          rng: of the draws.
        """
        near = self.near(agent)
        kept = len(near) - round(self.dropout * len(near))
        chosen = [near[at] for at in rng.permutation(len(near))[: min(kept, self.neighbours)]]
        if self.dropout:
            rest = [other for other in range(self.side**2) if other not in (agent, *near)]
            missing = self.neighbours - len(chosen)
            chosen += [rest[at] for at in rng.permutation(len(rest))[:missing]]
        return sorted(chosen)

    def settle(self, memories: Sequence[Memory], world: str, *, each: int = 50) -> None:
        """Give every agent memories before the first round, dealt out in order.

        Args:
          memories: questions with a good and a bad answer.
          world: which of the two an agent remembers: "all_good", "all_bad", "half_half" (every
            other agent the bad ones), "mixed_half_half" (every agent every other one).
          each: memories of an agent; the sandbox's 50.

        Raises:
          UserError: there is no such world, or no memory.
        """
        if world not in WORLDS:
            raise UserError(f"world: {world!r} is none of {', '.join(WORLDS)}")
        if not memories:
            raise UserError("memories: there are none")
        vectors = self.backend.embed([one.question for one in memories])
        for agent, own in enumerate(self.memory):
            for at in range(min(each, len(memories))):
                place = (agent * each + at) % len(memories)
                bad = {"half_half": agent % 2, "mixed_half_half": at % 2, "all_bad": 1}.get(world)
                one = memories[place]
                own[one.question] = (one.bad if bad else one.good), vectors[place]

    def recalled(self, agent: int, question: str, vector: np.ndarray) -> str:
        """What an agent remembers of the nearest question, if it is near enough."""
        own = self.memory[agent]
        if not own:
            return ""
        known, (answer, nearest) = max(own.items(), key=lambda item: float(item[1][1] @ vector))
        if 1 - float(nearest @ vector) > RECALLED:
            return ""
        return REMEMBERED.format(question=known, answer=answer)

    def rounds(self, questions: Sequence[str], number: int) -> Iterator[Encounter]:
        """Every agent asks itself its question of the round; yields round by round.

        Args:
          questions: dealt out in order, again from the first when there are no more.
          number: of rounds.

        References:
          Liu et al. 2023, arXiv:2305.16960, section 3 (back-scatter).
        """
        agents = self.side**2
        for one in range(number):
            asked = [questions[(one * agents + at) % len(questions)] for at in range(agents)]
            yield from self._round(one, asked)

    def _round(self, number: int, asked: Sequence[str]) -> list[Encounter]:
        agents = range(len(asked))
        vectors = self.backend.embed(asked)
        memories = [self.recalled(at, asked[at], vectors[at]) for at in agents]
        seed = self.seed * 1009 + number * 3

        def said(texts: Sequence[str], stage: int, stop: str) -> list[str]:
            decoding = Decoding(
                max_tokens=self.decoding.max_tokens,
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
                stop=tuple(dict.fromkeys((*self.decoding.stop, stop))),
                seed=seed + stage,
            )
            return _each_its_own(self.backend, texts, decoding)

        drafts = said(
            [ANSWER.format(memory=memories[at], question=asked[at]) for at in agents],
            0,
            "\nQuestion:",
        )
        rng = np.random.default_rng([self.seed, number])
        pairs: list[tuple[int, int]] = []
        for at in agents:
            pairs += [(at, other) for other in self.asked_of(at, rng)]
        asked_others = [
            FEEDBACK.format(
                memory=self.recalled(other, asked[at], vectors[at]),
                question=asked[at],
                answer=drafts[at],
            )
            for at, other in pairs
        ]
        feedback: list[list[tuple[int, float, str]]] = [[] for _ in agents]
        for (at, other), (rating, text) in zip(pairs, self._rated(asked_others, said), strict=True):
            feedback[at].append((other, rating, text))
        feedback = [sorted(some, key=_lowest_last) for some in feedback]
        prompts = [
            REVISE.format(
                memory=memories[at],
                question=asked[at],
                answer=drafts[at],
                mean=_mean([rating for _, rating, _ in feedback[at]]),
                feedback="\n".join(f"- {text}" for _, _, text in feedback[at]),
            )
            for at in agents
        ]
        revisions = said(prompts, 2, "\nQuestion:")
        ratings = self._observed([*asked, *asked], [*drafts, *revisions])
        for at in agents:
            if revisions[at]:
                self.memory[at][asked[at]] = revisions[at], vectors[at]
        return [
            Encounter(
                round=number,
                agent=at,
                question=asked[at],
                draft=drafts[at],
                draft_rating=ratings[at],
                feedback=feedback[at],
                revision=revisions[at],
                revision_rating=ratings[len(asked) + at],
            )
            for at in agents
        ]

    def _observed(self, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        texts = [
            OBSERVE.format(question=question, answer=answer)
            for question, answer in zip(questions, answers, strict=True)
        ]
        if self.ratings == "scored":
            return expected_scores(self.observer, texts, 7)
        found = self.observer.generate(texts, Decoding(max_tokens=16))
        return [rating_of(one.text) for [one] in found]

    def _rated(
        self, questions: Sequence[str], said: Callable[[Sequence[str], int, str], list[str]]
    ) -> list[tuple[float, str]]:
        """Ratings, and the texts with their reasons."""
        if self.ratings == "written":
            return [(rating_of(text), text) for text in said(questions, 1, "\nQuestion:")]
        values = expected_scores(self.backend, questions, 7)
        marks = [f"{value:.0f}" if math.isfinite(value) else "?" for value in values]
        begun = [f"{text} {mark}." for text, mark in zip(questions, marks, strict=True)]
        reasons = said(begun, 1, "\nQuestion:")
        texts = [f"{mark}. {reason}" for mark, reason in zip(marks, reasons, strict=True)]
        return list(zip(values, texts, strict=True))


def _each_its_own(backend: Backend, texts: Sequence[str], decoding: Decoding) -> list[str]:
    """A response to each text; equal texts are samples of one prompt, and differ."""
    places: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
    said = [""] * len(texts)
    for number in sorted({len(some) for some in places.values()}):
        asked = [text for text, some in places.items() if len(some) == number]
        answers = backend.generate(asked, decoding, samples=number)
        for text, row in zip(asked, answers, strict=True):
            for place, one in zip(places[text], row, strict=True):
                said[place] = one.text.strip()
    return said


def rating_of(text: str) -> float:
    """The whole number from 1 to 7 that a text begins with; NaN: there is none."""
    found = RATING.match(text)
    return float(found[1]) if found else math.nan


def _lowest_last(one: tuple[int, float, str]) -> float:
    return -one[1] if math.isfinite(one[1]) else -8.0


def _mean(ratings: Sequence[float]) -> str:
    known = [rating for rating in ratings if math.isfinite(rating)]
    return f"{math.fsum(known) / len(known):.1f}" if known else "?"


def society_data(encounter: Encounter) -> dict[str, list[dict[str, Any]]]:
    """What an encounter teaches.

    Args:
      encounter: of `Society`.

    Returns:
      "imitation": both answers with the observer's ratings (of alignment alone, where the sandbox
      has engagement, too); "self_critic": feedback on the draft, if there is one; "realignment":
      the revision, where it is rated above the draft and above 4; "pairs": draft and revision, the
      better one chosen, where ratings differ.

    References:
      Liu et al. 2023, arXiv:2305.16960, section 3 and the released data.
    """
    one = encounter
    answers = [(one.draft, one.draft_rating), (one.revision, one.revision_rating)]
    rated = [(text, rating) for text, rating in answers if math.isfinite(rating) and text]
    found: dict[str, list[dict[str, Any]]] = {
        "imitation": [
            {"prompt": one.question, "response": text, "rating": rating} for text, rating in rated
        ],
        "self_critic": [
            {
                "prompt": f"{one.question}\n\nAnswer: {one.draft}\n\nFeedback:",
                "response": text,
                "rating": rating,
            }
            for _, rating, text in one.feedback
            if math.isfinite(rating) and one.draft
        ],
        "realignment": [],
        "pairs": [],
    }
    if len(rated) < 2 or rated[0][1] == rated[1][1]:
        return found
    if one.revision_rating > max(one.draft_rating, 4.0):
        words = "\n".join(text for _, _, text in one.feedback)
        prompt = f"{one.question}\n\nAnswer: {one.draft}\n\nFeedback: {words}\n\nRevision:"
        found["realignment"].append({"prompt": prompt, "response": one.revision})
    better, worse = sorted(rated, key=lambda row: -row[1])
    found["pairs"].append(
        {
            "prompt": one.question,
            "chosen": better[0],
            "rejected": worse[0],
            "ratings": [better[1], worse[1]],
        }
    )
    return found


def comparison_data(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All rated answers to a question, as `stable_alignment_rated` reads them.

    Args:
      rows: of "imitation", of all encounters.

    Returns:
      {prompt, responses, ratings}; questions with one answer, or of one rating, are left out.
    """
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], {}).setdefault(row["response"], row["rating"])
    return [
        {"prompt": prompt, "responses": list(rated), "ratings": list(rated.values())}
        for prompt, rated in groups.items()
        if len(set(rated.values())) > 1
    ]
