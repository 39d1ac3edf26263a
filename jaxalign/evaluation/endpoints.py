"""Judging by a language model behind an OpenAI-compatible endpoint."""

import math
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.backends.client import Client, RefusedError, UnusableError, Usage, split_address
from jaxalign.evaluation.templates import CHAT, Template, read_template
from jaxalign.evaluation.verdicts import Answer

VERDICT = re.compile(r"[\s\"'*`(\[]*(A|B|[Tt]ie|TIE)[\s\"'*`)\].]*")
VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judge that is asked over HTTP, many comparisons at a time.

    Where the server gives log-probs of the first token, the preference is soft: probabilities of
    the labels A, B and tie (half to either side), normalised. Else it is 1, 0 or 0.5.

    Attributes:
      client: of the server.
      model: as the server calls it.
      template: the question.
    """

    client: Client
    model: str
    template: Template
    order_free: bool = False
    parameters: dict[str, Any] = field(
        default_factory=lambda: {
            "temperature": 0,
            "max_tokens": 16,
            "logprobs": True,
            "top_logprobs": 10,
        }
    )
    """Of every request; those that the server refuses are left out from then on."""

    @property
    def identity(self) -> str:
        """Endpoint, model and template."""
        return f"openai {self.url} {self.model} {self.template.fingerprint}"

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.client.url}/chat/completions"

    @property
    def usage(self) -> Usage:
        """What was asked for so far."""
        return self.client.usage

    def answers(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[Answer]:
        """As in `Judge`.

        Raises:
          UserError: key, URL or model are refused, or the server cannot be reached.
        """

        def ask(number: int, stopped: threading.Event) -> Answer:
            question = self.template.fill(prompts[number], first[number], second[number])
            turns = [{"role": "user", "content": question}]
            body = {"model": self.model, "messages": turns, **self.parameters}
            try:
                preference, said = self.client.ask("chat/completions", body, _read, stopped)
            except RefusedError as error:
                reason = str(error)
                return Answer(number=number, preference=math.nan, reason=reason, detail=error.said)
            return Answer(number=number, preference=preference, detail=said)

        for _, answer in self.client.together(len(prompts), ask):
            yield answer


def _read(reply: Any) -> tuple[float, str]:
    """P(A is better), and what the model said."""
    choice = reply["choices"][0]
    text = str(choice["message"]["content"] or "")
    preference = preference_of(text, choice.get("logprobs"))
    if preference is None:
        raise UnusableError("the answer is neither A, B nor tie", text)
    return preference, text


def preference_of(text: str, logprobs: Any) -> float | None:
    """P(A is better) of an answer that is A, B or tie; None of any other.

    Args:
      text: the answer; quotes, brackets, asterisks and a full stop around it do not count.
      logprobs: as a chat completion has them, or None.
    """
    said = VERDICT.fullmatch(text)
    if said is None:
        return None
    weights = dict.fromkeys(VALUES, 0.0)
    try:
        for candidate in logprobs["content"][0]["top_logprobs"]:
            name = str(candidate["token"]).strip()
            name = name.lower() if name in ("A", "B") or name.lower() == "tie" else ""
            if name in weights:
                weights[name] += math.exp(float(candidate["logprob"]))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return VALUES[said[1].lower()]
    if not weights[said[1].lower()] > 0:  # the first token is not the label
        return VALUES[said[1].lower()]
    return sum(VALUES[name] * weight for name, weight in weights.items()) / sum(weights.values())


def endpoint(address: str, *, template: Path | None = None, **options: Any) -> Endpoint:
    """The judge of "URL#MODEL".

    Args:
      address: e.g. "https://api.openai.com/v1#gpt-4.1-mini" or "http://localhost:8000#judge".
      template: file with {prompt}, {first} and {second}.
      **options: of `Client`.
    """
    url, model = split_address(address, "judge")
    return Endpoint(
        client=Client(url, **options), model=model, template=read_template(template, CHAT)
    )
