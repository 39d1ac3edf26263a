"""Answers with fields, from models that write text: read strictly, asked again, counted."""

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
    """An answer that cannot be read, and why."""


def read_object(text: str) -> Mapping[str, Any]:
    """The JSON object of an answer: in a fence, or the first braces that balance.

    Thoughts before the answer are passed over. Line breaks within strings are allowed; nothing is
    guessed or mended.

    Args:
      text: what the model wrote.

    Raises:
      MalformedError: there is none.
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
    """A field that is text and not empty.

    Raises:
      MalformedError: it is not.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise MalformedError(f"{name} is missing, empty or not text")
    return value.strip()


class Asker:
    """Asks a model for objects.

    An answer that cannot be read is asked for again, the answer and the fault shown; how often each
    fault came is counted.

    Args:
      backend: the model.
      decoding: of its answers.
      attempts: for each question.
    """

    def __init__(self, backend: Backend, decoding: Decoding, *, attempts: int = 2):
        self.backend, self.decoding, self.attempts = backend, decoding, attempts
        self.asked = 0
        self.malformed: Counter[str] = Counter()
        """Answers that could not be read, by role; those that were mended by asking again, too."""
        self.failed: Counter[str] = Counter()
        """Questions without a usable answer, by role."""

    def __call__(
        self,
        role: str,
        questions: Sequence[str],
        read: Sequence[Callable[[Mapping[str, Any]], T]],
        *,
        samples: int = 1,
    ) -> list[list[T]]:
        """What the answers say; fewer than `samples` where some could not be read.

        Args:
          role: the count's name.
          questions: texts, each a user's turn.
          read: makes of each one's object what is wanted, or raises `MalformedError`.
          samples: answers to each.

        Raises:
          UserError: the model cannot be asked; names the role.
        """
        found: list[list[T]] = [[] for _ in questions]
        asking: list[tuple[int, Prompt]] = [
            (at, [{"role": "user", "content": question}]) for at, question in enumerate(questions)
        ]
        self.asked += len(questions) * samples
        for attempt in range(self.attempts):
            if not asking:
                break
            number = samples if attempt == 0 else 1
            prompts = [prompt for _, prompt in asking]
            try:
                answers = self.backend.generate(prompts, self.decoding, samples=number)
            except UserError as error:
                raise UserError(f"{role}: {error}") from None
            again: list[tuple[int, Prompt]] = []
            for (at, prompt), some in zip(asking, answers, strict=True):
                for answer in some:
                    try:
                        if answer.failure:  # the backend has tried again where that may help
                            self.malformed[role] += 1
                            continue
                        found[at].append(read[at](read_object(answer.text)))
                    except MalformedError as fault:
                        self.malformed[role] += 1
                        again.append((at, [*cast(Any, prompt), *_mend(answer.text, fault)]))
            asking = again
        self.failed[role] += sum(samples - len(some) for some in found)
        return found


def _mend(said: str, fault: MalformedError) -> list[Any]:
    words = (
        f"That cannot be used: {fault}. Reply with the JSON object alone, in the form asked for."
    )
    return [{"role": "assistant", "content": said}, {"role": "user", "content": words}]
