"""Judging by a language model behind an OpenAI-compatible endpoint."""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.backends.client import (
    THINKING_TOKENS,
    Client,
    RefusedError,
    UnusableError,
    Usage,
    split_address,
    text_of_choice,
)
from jaxalign.evaluation.templates import CHAT, Template, read_template
from jaxalign.evaluation.verdict_text import read_verdict
from jaxalign.evaluation.verdicts import Answer

AROUND = " \n\t\"'*`_()[]{}.,:;!#>“”"
VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}
REMINDER = "That is not a verdict. Reply with A, B or tie, and nothing else."


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judge that is asked over HTTP, many comparisons at a time.

    Where the server gives log-probs of the token with the label, the preference is soft:
    probabilities of the labels A, B and tie (half to either side) in its place, normalised. Else it
    is 1, 0 or 0.5. After an answer without a verdict the judge is reminded once of the form, or
    given more tokens if it was cut off.

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
                try:
                    preference, said = self.client.ask("chat/completions", body, _read, stopped)
                except RefusedError as error:
                    body |= self._repeat(turns, error)
                    preference, said = self.client.ask("chat/completions", body, _read, stopped)
            except RefusedError as error:
                reason = str(error)
                return Answer(number=number, preference=math.nan, reason=reason, detail=error.text)
            return Answer(number=number, preference=preference, detail=said)

        for _, answer in self.client.together(len(prompts), ask):
            yield answer

    def _repeat(self, turns: list[dict[str, str]], error: RefusedError) -> dict[str, Any]:
        """What a second request changes after an answer without a verdict.

        Raises:
          RefusedError: `error`, where a second request would not help.
        """
        if self.client.attempts > 1 and error.cut:
            return {"max_tokens": max(THINKING_TOKENS, self.parameters["max_tokens"])}
        if self.client.attempts > 1 and error.text and not error.final:
            said = [{"role": "assistant", "content": error.text}]
            return {"messages": [*turns, *said, {"role": "user", "content": REMINDER}]}
        raise error


def _read(reply: Any) -> tuple[float, str]:
    """P(A is better), and what the model said."""
    choice = reply["choices"][0]
    text = text_of_choice(choice)
    cut = choice.get("finish_reason") == "length"
    preference = preference_of(text, choice.get("logprobs"), cut=cut)
    if preference is None:
        raise UnusableError("the answer is neither A, B nor tie", text, cut=cut)
    return preference, text


def preference_of(text: str, logprobs: Any, *, cut: bool = False) -> float | None:
    """P(A is better) of an answer that says A, B or tie; None of any other.

    Args:
      text: the answer, as `read_verdict` reads it.
      logprobs: as a chat completion has them, or None; those of the token with the label count.
      cut: the answer was cut off.
    """
    found = read_verdict(text, cut=cut)
    if found is None:
        return None
    said, at = found
    weights = dict.fromkeys(VALUES, 0.0)
    small = text[at] in ("a", "b")
    names = {"a": "a", "b": "b"} if small else {"A": "a", "B": "b"}
    try:
        for place, (token, log_prob) in enumerate(_at_label(text, at, logprobs["content"])):
            word = token.strip(AROUND)
            name = said if place == 0 else names.get(word, word.lower())
            if name in weights and (name == "tie" or place == 0 or word in names):
                weights[name] += math.exp(min(log_prob, 0.0))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return VALUES[said]
    total = sum(weights.values())
    if not (weights[said] > 0 and math.isfinite(total)):
        return VALUES[said]
    return sum(VALUES[name] * weight for name, weight in weights.items()) / total


def _at_label(text: str, at: int, content: Any) -> list[tuple[str, float]]:
    """The token at a position of the text, and those that could have stood in its place.

    Empty where it is not known which token stands there.

    Raises:
      ValueError: tokens and text differ (so do TypeError and others, for other fields).
    """
    joined = "".join(item["token"] for item in content)
    if not text.startswith(joined):  # what a server took out, such as thoughts, stands before
        at += joined.rindex(text)
    for item in content:
        at -= len(item["token"])
        if at < 0:
            others = {one["token"]: float(one["logprob"]) for one in item["top_logprobs"]}
            own = others.pop(item["token"], None)
            own = float(item["logprob"]) if own is None else own
            return [(item["token"], own), *others.items()]
    return []


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
