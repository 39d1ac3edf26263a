"""Judging by a language model behind an OpenAI-compatible endpoint."""

import concurrent.futures
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.backends.http import (
    PassingError,
    Patience,
    RefusedError,
    UnknownParameterError,
    leave_out,
    post,
    split_address,
    wait_before,
)
from jaxalign.errors import UserError
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
      url: of the chat completions.
      model: as the server calls it.
      template: the question.
      workers: requests at a time.
      timeout: seconds for one request.
      attempts: for one comparison, with waits that double between them.
      first_wait: seconds before the second attempt.
    """

    url: str
    model: str
    template: Template
    workers: int = 8
    timeout: float = 60.0
    attempts: int = 4
    first_wait: float = 1.0
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

    def answers(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[Answer]:
        """As in `Judge`.

        Raises:
          UserError: key, URL or model are refused, or the server cannot be reached.
        """
        patience = Patience(self.workers)
        pool = concurrent.futures.ThreadPoolExecutor(self.workers)
        try:
            asked = [
                pool.submit(self._answer, number, self.template.fill(*texts), patience)
                for number, texts in enumerate(zip(prompts, first, second, strict=True))
            ]
            for done in concurrent.futures.as_completed(asked):
                yield done.result()
        finally:
            patience.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, number: int, question: str, patience: Patience) -> Answer:
        reason, detail = "", ""
        for attempt in range(self.attempts):
            if patience.stopped.is_set():
                break
            try:
                preference, detail = self._asked(question)
            except RefusedError as error:
                return Answer(number=number, preference=math.nan, reason=str(error))
            except PassingError as error:
                reason = error.reason
                if error.unreached and patience.ended(last=attempt + 1 == self.attempts):
                    raise UserError(
                        f"{self.url}: {reason}; what was answered is kept, and the same command "
                        "asks for the rest"
                    ) from None
                if attempt + 1 < self.attempts:
                    patience.stopped.wait(wait_before(attempt, self.first_wait, error.wait))
                continue
            patience.renew()
            if preference is not None:
                return Answer(number=number, preference=preference, detail=detail)
            reason = "the answer is neither A, B nor tie"
        return Answer(number=number, preference=math.nan, reason=reason, detail=detail)

    def _asked(self, question: str) -> tuple[float | None, str]:
        """P(A is better), None where it cannot be told, and what the model said."""
        body = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        while True:
            parameters = dict(self.parameters)
            try:
                reply = post(self.url, body | parameters, self.timeout)
                break
            except UnknownParameterError as error:
                if error.name not in parameters:
                    raise RefusedError(error.reason) from None
                leave_out(self.parameters, error.name)
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise PassingError("the reply is no chat completion") from None
        return preference_of(str(text), choice.get("logprobs")), str(text)


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


def endpoint(
    address: str,
    *,
    template: Path | None = None,
    workers: int = 8,
    timeout: float = 60.0,
    attempts: int = 4,
    first_wait: float = 1.0,
) -> Endpoint:
    """The judge of "URL#MODEL".

    Args:
      address: e.g. "https://api.openai.com/v1#gpt-4.1-mini" or "http://localhost:8000#judge"; the
        key is read from the environment variable OPENAI_API_KEY.
      template: file with {prompt}, {first} and {second}.
      workers: requests at a time.
      timeout: seconds for one request.
      attempts: for one comparison.
      first_wait: seconds before the second attempt, doubled from then on.
    """
    url, model = split_address(address, "judge")
    for name, value in (("workers", workers), ("attempts", attempts), ("timeout", timeout)):
        if value <= 0:
            raise UserError(f"{name}: {value} is not positive")
    return Endpoint(
        url=f"{url}/chat/completions",
        model=model,
        template=read_template(template, CHAT),
        workers=workers,
        timeout=timeout,
        attempts=attempts,
        first_wait=first_wait,
    )
