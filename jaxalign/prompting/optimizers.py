"""Proposals of the next system prompt."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxalign.backends.structured import MalformedError, StructuredClient, text_field
from jaxalign.errors import UserError
from jaxalign.evaluation.single_scores import Evaluation

MOST_BULLETS = 8
MOST_WORDS = 500
"""Words of a prompt, as the model is asked; a longer one is not refused."""
ADDED_BULLETS = 2
"""Largest number of bullet points added in a step."""
BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+", re.M)


@runtime_checkable
class Attempt(Protocol):
    """A prompt, its output for a query, and the evaluation of the output."""

    @property
    def prompt(self) -> str: ...
    @property
    def query(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def evaluation(self) -> Evaluation: ...


@runtime_checkable
class PromptOptimizer(Protocol):
    """Proposes system prompts."""

    def __call__(self, histories: Sequence[Sequence[Attempt]], number: int) -> list[list[str]]:
        """Propose up to `number` prompts for each history of attempts, the latest one last."""
        ...


def bullets(prompt: str) -> list[str]:
    """The bullet points of a prompt."""
    return [line.strip() for line in prompt.splitlines() if BULLET.match(line)]


def judgement(attempt: Attempt) -> str:
    """The scores, to two digits, and reasons of an attempt, as JSON; or why there are none."""
    evaluation = attempt.evaluation
    known: dict[str, dict[str, float | str]] = {}
    for name, score in evaluation.scores.items():
        known[name] = {"score": round(score, 2)}
        if reason := evaluation.reasons.get(name):
            known[name]["reason"] = reason
    return json.dumps(known or {"failure": evaluation.failure}, indent=1, ensure_ascii=False)


OPTIMIZE = """\
The system prompt of an assistant is to be improved. It is used for requests of all kinds, of which
one is shown with the assistant's response and what a judge said of it.

[Current system prompt]
{prompt}

[Earlier versions, oldest first]
{earlier}

[Request]
{query}

[Response]
{output}

[Judgement, each criterion from 1 to 5]
{judgement}

Write a better system prompt.
- It serves every kind of request: nothing in it is about this one alone.
- It begins with a paragraph on who the assistant is and what it can do; bullet points follow.
- It says what the assistant cannot do (no internet, no acts in the world), that harmful requests
  are declined with a reason, and that declining is better than answering something else.
- It says how to be engaging and human.
- At most {most} short bullet points, at most {added} more than now; merge points rather than drop
  them.
- It has at most {words} words, and no example requests.
Reply with one JSON object and nothing else:
{{"analysis": "one sentence: what went wrong", "thought": "one sentence: what to change",
"new_system_prompt": "..."}}
"""


class AskedOptimizer:
    """A model that writes the next prompt.

    A prompt that breaks the rules on bullet points is a malformed answer.

    Args:
      client: the model; the paper's temperature is 0.2 with top-p 0.95.
      remembered: number of earlier prompts that it is shown; the paper's 5.
      words: largest number of words that it is asked for; what fits the client's answers.

    References:
      Singla et al. 2024, arXiv:2411.08733, section 3; the limits of the released prompts.
    """

    def __init__(self, client: StructuredClient, *, remembered: int = 5, words: int = MOST_WORDS):
        self.client, self.remembered, self.words = client, remembered, words

    def __call__(self, histories: Sequence[Sequence[Attempt]], number: int) -> list[list[str]]:
        """As in `PromptOptimizer`; equal proposals are returned once."""
        readers = [self._reader(history[-1].prompt) for history in histories]
        questions = list(map(self._question, histories))
        answers = self.client("optimizer", questions, readers, samples=number)
        return [list(dict.fromkeys(row)) for row in answers]

    def _question(self, history: Sequence[Attempt]) -> str:
        last = history[-1]
        earlier = list(dict.fromkeys(one.prompt for one in history if one.prompt != last.prompt))
        earlier = earlier[-self.remembered :]
        shown = [f"(version {n})\n{text}" for n, text in enumerate(earlier, 1)]
        return OPTIMIZE.format(
            prompt=last.prompt,
            earlier="\n\n".join(shown) or "(none)",
            query=last.query,
            output=last.output,
            judgement=judgement(last),
            most=MOST_BULLETS,
            added=ADDED_BULLETS,
            words=self.words,
        )

    def _reader(self, current: str) -> Callable[[Mapping[str, Any]], str]:
        before = len(bullets(current))

        def read(fields: Mapping[str, Any]) -> str:
            text = text_field(fields, "new_system_prompt")
            number = len(bullets(text))
            if number > MOST_BULLETS:
                raise MalformedError(f"{number} bullet points are more than {MOST_BULLETS}")
            if before and number > before + ADDED_BULLETS:  # the first prompt has none yet
                raise MalformedError(f"{number} bullet points are {number - before} more than now")
            return text

        return read


REFLECT = """\
An assistant was given the system prompt below, and then the requests after it. A judge has said
what is good and bad in each of its responses.

[System prompt]
{prompt}

{attempts}

Write a new system prompt for the assistant.
- Read all the requests first, and describe to yourself what is asked for and in which form.
- Find in the judgements what went well, and keep it; find what went wrong, and say how to do it.
- Write down facts and ways of working that the assistant will need again: it sees neither these
  requests nor their judgements.
- Nothing in it is about one request alone.
- It has at most {words} words.
Reply with one JSON object and nothing else:
{{"analysis": "one sentence: what went wrong", "thought": "one sentence: what to change",
"new_system_prompt": "..."}}
"""
ATTEMPT = """\
[Request {number}]
{query}

[Response {number}]
{output}

[Judgement {number}, each criterion from 1 to 5]
{judgement}"""


class AskedReflector:
    """A model that reads the responses to several requests, and writes the next prompt (GEPA).

    Args:
      client: the model.
      words: largest number of words that it is asked for; what fits the client's answers.

    References:
      Agrawal et al., 2025, arXiv:2507.19457, section 3.2, in our own wording.
    """

    def __init__(self, client: StructuredClient, *, words: int = MOST_WORDS):
        self.client, self.words = client, words

    def __call__(self, histories: Sequence[Sequence[Attempt]], number: int) -> list[list[str]]:
        """As in `PromptOptimizer`, where a history has the attempts of one prompt."""

        def read(fields: Mapping[str, Any]) -> str:
            return text_field(fields, "new_system_prompt")

        questions = list(map(self._question, histories))
        readers = [read] * len(questions)
        answers = self.client("optimizer", questions, readers, samples=number)
        return [list(dict.fromkeys(row)) for row in answers]

    def _question(self, history: Sequence[Attempt]) -> str:
        attempts = [
            ATTEMPT.format(
                number=number, query=one.query, output=one.output, judgement=judgement(one)
            )
            for number, one in enumerate(history, 1)
        ]
        return REFLECT.format(
            prompt=history[-1].prompt, attempts="\n\n".join(attempts), words=self.words
        )


class BankOptimizer:
    """Edits from a bank of bullet points, without a model: add one, drop one or exchange one.

    For machines without a model that can write a prompt. The order of the edits is determined by
    the prompt, the query and the seed.

    Args:
      bank: bullet points, without their marks.
      seed: seed of the order of the edits.
      all_queries: whether the order also depends on the queries of earlier attempts, so that other
        minibatches with the same last query give other edits.

    Raises:
      UserError: the bank is empty.
    """

    def __init__(self, bank: Sequence[str], *, seed: int = 0, all_queries: bool = False):
        self.bank, self.seed = [point.strip() for point in bank if point.strip()], seed
        self.all_queries = all_queries
        if not self.bank:
            raise UserError("bank: it has no bullet points")

    def __call__(self, histories: Sequence[Sequence[Attempt]], number: int) -> list[list[str]]:
        """As in `PromptOptimizer`."""
        return [self._proposals(history, number) for history in histories]

    def _proposals(self, history: Sequence[Attempt], number: int) -> list[str]:
        last = history[-1]
        lines = last.prompt.rstrip().splitlines()
        own = [line[2:] for line in lines if line.startswith("- ") and line[2:] in self.bank]
        rest = [point for point in self.bank if point not in own]
        edits = [[*own, new] for new in rest] if len(own) < MOST_BULLETS else []
        edits += [[point for point in own if point != old] for old in own]
        edits += [[new if point == old else point for point in own] for old in own for new in rest]
        queries = [one.query for one in history] if self.all_queries else last.query
        key = json.dumps([last.prompt, queries, self.seed])
        rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
        head = [line for line in lines if not (line.startswith("- ") and line[2:] in self.bank)]
        chosen = [edits[at] for at in rng.permutation(len(edits))[:number]]
        return ["\n".join([*head, *(f"- {point}" for point in points)]) for points in chosen]
