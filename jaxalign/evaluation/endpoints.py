"""Judging by a language model behind an OpenAI-compatible endpoint."""

import concurrent.futures
import json
import math
import os
import random
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation.templates import CHAT, Template, read_template
from jaxalign.evaluation.verdicts import Answer

KEY = "OPENAI_API_KEY"
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
REFUSING = {
    401: f"the key is refused; set {KEY}",
    403: f"access is refused; check {KEY} and what it may use",
    404: "there is no such endpoint or model; check URL and MODEL",
}
LONGEST_WAIT = 60.0  # seconds
VERDICT = re.compile(r"[\s\"'*`(\[]*(A|B|[Tt]ie|TIE)[\s\"'*`)\].]*")
UNSUPPORTED = re.compile(r"support|unknown|unrecogni[sz]ed|extra|permitted|not allowed", re.I)
VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}


class PassingError(Exception):
    """What may go better the next time; how long the server wants to be left alone, if it says."""

    def __init__(self, reason: str, wait: float | None = None, *, unreached: bool = False):
        super().__init__(reason)
        self.reason, self.wait, self.unreached = reason, wait, unreached


class RefusedError(Exception):
    """What would fail again for this comparison."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


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
        patience = _Patience(self.workers)
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

    def _answer(self, number: int, question: str, patience: "_Patience") -> Answer:
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
                    patience.stopped.wait(self._wait(attempt, error.wait))
                continue
            patience.renew()
            if preference is not None:
                return Answer(number=number, preference=preference, detail=detail)
            reason = "the answer is neither A, B nor tie"
        return Answer(number=number, preference=math.nan, reason=reason, detail=detail)

    def _wait(self, attempt: int, wanted: float | None) -> float:
        """Seconds: what the server wants, else twice as long each time, not all at once."""
        doubled = self.first_wait * 2**attempt * random.uniform(0.5, 1.0)
        return min(max(doubled, wanted or 0.0), LONGEST_WAIT)

    def _asked(self, question: str) -> tuple[float | None, str]:
        """P(A is better), None where it cannot be told, and what the model said."""
        body = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        while True:
            parameters = dict(self.parameters)
            try:
                reply = self._post(body | parameters)
                break
            except _UnknownParameterError as error:
                if error.name not in parameters:
                    raise RefusedError(error.reason) from None
                self._leave_out(error.name)
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise PassingError("the reply is no chat completion") from None
        return preference_of(str(text), choice.get("logprobs")), str(text)

    def _leave_out(self, name: str) -> None:
        if self.parameters.pop(name, None) is not None and name == "max_tokens":
            self.parameters["max_completion_tokens"] = 1024  # models that think before they answer
        if "logprobs" in name:  # one is of no use without the other
            self.parameters.pop("logprobs", None)
            self.parameters.pop("top_logprobs", None)

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._refused(error, body) from None
        except TimeoutError:
            raise PassingError(f"no answer within {self.timeout:g} s") from None
        except (urllib.error.URLError, HTTPException, OSError) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise PassingError(f"no answer within {self.timeout:g} s") from None
            if isinstance(cause, socket.gaierror):
                raise UserError(f"{self.url}: there is no such host; check the URL") from None
            words = getattr(cause, "strerror", None) or cause or type(error).__name__
            reason = f"it cannot be reached ({words})"
            raise PassingError(reason, unreached=True) from None
        except ValueError:  # neither JSON nor UTF-8
            raise PassingError("the reply is not JSON") from None

    def _refused(self, error: urllib.error.HTTPError, body: Mapping[str, Any]) -> Exception:
        if error.code in PASSING:
            after = error.headers.get("Retry-After", "")
            return PassingError(f"HTTP {error.code}", float(after) if after.isdigit() else None)
        if error.code in REFUSING:
            return UserError(f"{self.url}: HTTP {error.code}: {REFUSING[error.code]}")
        try:
            words = error.read(2000).decode(errors="replace")
        except OSError:
            words = ""
        reason = f"HTTP {error.code}: {' '.join(words.split())[:200]}"
        if error.code in (400, 422) and UNSUPPORTED.search(words):
            for name in body:
                if name not in ("model", "messages") and re.search(rf"\b{name}\b", words):
                    return _UnknownParameterError(name, reason)
        return RefusedError(reason)


class _UnknownParameterError(Exception):
    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name, self.reason = name, reason


class _Patience:
    """How often a server that does not answer at all is asked, over all requests."""

    def __init__(self, workers: int):
        self.lock = threading.Lock()
        self.most, self.left, self.answered = 2 * workers, 2 * workers, False
        self.stopped = threading.Event()

    def renew(self) -> None:
        with self.lock:
            self.left, self.answered = self.most, True

    def ended(self, *, last: bool) -> bool:
        """After one more failure: at the last attempt of a first comparison, or after many."""
        with self.lock:
            self.left -= last
            return self.left <= 0 or (last and not self.answered)


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
    url, _, model = address.partition("#")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or not model:
        raise UserError(
            f"judge: openai:{address} is not openai:URL#MODEL, as in "
            "openai:http://localhost:8000/v1#my-model"
        )
    for name, value in (("workers", workers), ("attempts", attempts), ("timeout", timeout)):
        if value <= 0:
            raise UserError(f"{name}: {value} is not positive")
    url = url.rstrip("/")
    if not url.endswith("/chat/completions"):
        url += "/chat/completions" if parts.path.strip("/") else "/v1/chat/completions"
    return Endpoint(
        url=url,
        model=model,
        template=read_template(template, CHAT),
        workers=workers,
        timeout=timeout,
        attempts=attempts,
        first_wait=first_wait,
    )
