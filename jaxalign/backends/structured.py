"""JSON objects from models that write text: parsed strictly, requested again, counted."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from jaxalign.backends import Backend, Decoding, Prompt
from jaxalign.errors import UserError

T = TypeVar("T")
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.S)


class MalformedError(Exception):
    """An answer that cannot be parsed; the message says why."""


def read_object(text: str) -> Mapping[str, Any]:
    """Parse the JSON object of an answer: in a code fence, or the first balanced braces.

    Thoughts before the answer are skipped. Line breaks within strings are allowed; nothing else is
    repaired.

    Args:
      text: text of the model.

    Raises:
      MalformedError: there is no JSON object.
    """
    text = text.rpartition("</think>")[2]
    fence = FENCED.search(text)
    text = fence[1] if fence else text
    begin = text.find("{")
    if begin < 0:
        raise MalformedError("there is no JSON object in it")
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(text[begin:])
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedError(f"the JSON cannot be read ({error})") from None
    return value


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """A field that must be a text that is not empty.

    Raises:
      MalformedError: it is missing, empty or not a text.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise MalformedError(f"{name} is missing, empty or not text")
    return value.strip()


class StructuredClient:
    """Requests JSON objects from a model.

    An answer that cannot be parsed is requested again; the model is shown the answer and the error.
    One that was cut at the token limit is not shown: small models would repeat it.

    Args:
      backend: the model.
      decoding: decoding of its answers.
      attempts: largest number of attempts for each question.
    """

    def __init__(self, backend: Backend, decoding: Decoding, *, attempts: int = 2):
        self.backend, self.decoding, self.attempts = backend, decoding, attempts
        self.asked: Counter[str] = Counter()
        """Number of answers that were wanted, by role, without repeated attempts."""
        self.malformed: Counter[str] = Counter()
        """Number of answers that could not be parsed, by role, including those requested again."""
        self.failed: Counter[str] = Counter()
        """Number of questions without a usable answer, by role."""

    def __call__(
        self,
        role: str,
        questions: Sequence[str],
        read: Sequence[Callable[[Mapping[str, Any]], T]],
        *,
        samples: int = 1,
    ) -> list[list[T]]:
        """The parsed answers to each question; fewer than `samples` if some could not be parsed.

        Args:
          role: name in the counts and in errors.
          questions: texts, each a user turn.
          read: one function per question; converts the object, or raises `MalformedError`.
          samples: number of answers to each question.

        Raises:
          UserError: the model cannot generate; the message names the role.
        """
        results: list[list[T]] = [[] for _ in questions]
        self.asked[role] += len(questions) * samples
        pending: list[tuple[int, Prompt]] = [
            (at, [{"role": "user", "content": question}]) for at, question in enumerate(questions)
        ]
        for attempt in range(self.attempts):
            if not pending:
                break
            number = samples if attempt == 0 else 1
            prompts = [prompt for _, prompt in pending]
            try:
                answers = self.backend.generate(prompts, self.decoding, samples=number)
            except UserError as error:
                raise UserError(f"{role}: {error}") from None
            again: list[tuple[int, Prompt]] = []
            for (at, prompt), row in zip(pending, answers, strict=True):
                for sample, answer in enumerate(row, start=1):
                    try:
                        if answer.failure:  # the backend has tried again where that may help
                            self.malformed[role] += 1
                            continue
                        results[at].append(read[at](read_object(answer.text)))
                    except MalformedError as fault:
                        self.malformed[role] += 1
                        asked: list[Any] = list(cast(Any, prompt))
                        if answer.finished:
                            again.append((at, [*asked, *_correction(answer.text, fault)]))
                        else:
                            again.append((at, [*asked[:-1], _shorter(asked[-1], sample)]))
            pending = again
        self.failed[role] += sum(samples - len(row) for row in results)
        return results


def _shorter(turn: Any, sample: int) -> Any:
    request = (
        f"Your answer {sample} was cut off, since it was too long. Write a much shorter one that "
        "repeats nothing."
    )
    return {**turn, "content": f"{turn['content']}\n{request}"}


def _correction(answer: str, fault: MalformedError) -> list[Any]:
    request = (
        f"That cannot be used: {fault}. Reply with the JSON object alone, in the form asked for."
    )
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": request}]
