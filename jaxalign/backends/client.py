"""Client of OpenAI-compatible servers: concurrent requests by the official package, counted."""

import concurrent.futures
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxalign.errors import UserError

T = TypeVar("T")
KEY = "OPENAI_API_KEY"
REFUSING = {
    401: f"the key is refused; set {KEY}",
    403: f"access is refused; check {KEY} and what it may use",
    404: "there is no such endpoint or model; check URL and MODEL",
}
UNSUPPORTED = re.compile(
    r"support|unknown|unexpected|unrecogni[sz]ed|extra|permitted|not allowed", re.I
)
CONTENT = {"chat/completions": "messages", "completions": "prompt", "embeddings": "input"}
"""Kind of request -> field with its content."""
NEEDED = ("top_k", "min_p", "repetition_penalty")
"""Parameters that are never dropped: without them, the distribution of texts would change."""
THINKING_TOKENS = 1024
"""Least token limit of models that think before they answer (`max_completion_tokens`)."""


class UnusableError(Exception):
    """A reply that cannot be used.

    Args:
      reason: in words.
      text: of the model.
      cut: whether the reply was truncated at the token limit.
      final: whether the same request would fail again.
    """

    def __init__(
        self,
        reason: str = "the reply is not what was asked for",
        text: str = "",
        *,
        cut: bool = False,
        final: bool = False,
    ):
        super().__init__(reason)
        self.text, self.cut, self.final = text, cut, final


class RefusedError(UnusableError):
    """A request without a usable reply after all attempts."""


@dataclass(kw_only=True)
class Usage:
    """Requests and tokens so far, as counted by the server."""

    requests: int = 0
    failures: int = 0
    """Requests without a usable reply after all attempts."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, prices: tuple[float, float]) -> float:
        """The cost of all tokens.

        Args:
          prices: of a million prompt tokens and of a million completion tokens.
        """
        tokens = self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]
        return tokens / 1e6


class Client:
    """A client of an OpenAI-compatible server.

    The package openai sends requests and retries lost connections, timeouts, and HTTP 408, 409, 429
    and 5xx, after the time that the server asks for. In addition, this class requests unusable
    replies again (not at temperature 0, where the reply would be the same), drops parameters that
    the server does not know, and raises an error if the server cannot be reached.

    Args:
      url: base URL, e.g. "http://localhost:8000/v1"; the key is read from the environment variable
        OPENAI_API_KEY.
      workers: number of simultaneous requests.
      timeout: time limit of a request in seconds.
      attempts: largest number of attempts for a request.
      requests_per_minute: rate limit; None: no limit.

    Raises:
      UserError: the package is not installed, or a number is not positive.
    """

    def __init__(
        self,
        url: str,
        *,
        workers: int = 8,
        timeout: float = 120.0,
        attempts: int = 4,
        requests_per_minute: float | None = None,
    ):
        for name, value in (("workers", workers), ("attempts", attempts), ("timeout", timeout)):
            if value <= 0:
                raise UserError(f"{name}: {value} is not positive")
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError(
                "openai: endpoints need the package openai; pip install 'jaxalign[openai]'"
            ) from None
        self.url, self.workers, self.timeout, self.attempts = url, workers, timeout, attempts
        self.usage = Usage()
        self._openai = openai.OpenAI(
            api_key=os.environ.get(KEY) or "none",  # servers without keys read no header
            base_url=url,
            timeout=timeout,
            max_retries=attempts - 1,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        self._rate_limiter, self._lock = RateLimiter(requests_per_minute), threading.Lock()
        self._unknown: set[str] = set()
        self._unreached, self._answered = 0, False

    def together(
        self, number: int, ask: Callable[[int, threading.Event], T]
    ) -> Iterator[tuple[int, T]]:
        """Results of `ask` for 0, ..., number - 1 as they complete, `workers` at a time.

        Args:
          number: of requests.
          ask: called in other threads, with an event that tells them to stop.
        """
        stopped = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(self.workers)
        try:
            asked = {pool.submit(ask, at, stopped): at for at in range(number)}
            for done in concurrent.futures.as_completed(asked):
                yield asked[done], done.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self,
        kind: str,
        body: Mapping[str, Any],
        read: Callable[[Any], T],
        stopped: threading.Event | None = None,
    ) -> T:
        """Request until a reply can be read.

        Args:
          kind: "chat/completions", "completions" or "embeddings".
          body: of the request.
          read: converts the reply's fields, or raises `UnusableError`; errors for missing fields or
            wrong types count as a broken reply.
          stopped: event that ends the attempts.

        Raises:
          RefusedError: no reply is usable after all attempts.
          UserError: the key, URL or model is refused, or the server cannot be reached.
        """
        fault, draws = UnusableError("stopped"), 0
        for _ in range(self.attempts):
            self._rate_limiter.wait(stopped or threading.Event())
            if stopped is not None and stopped.is_set():
                break
            # another seed, since the same one would give the same unusable reply
            own = {"seed": body["seed"] + draws} if "seed" in body else {}
            try:
                reply = self._reply(kind, {**body, **own})
            except RefusedError as error:
                fault = error
                break
            except UnusableError as error:
                fault = error
                continue
            try:
                return read(reply)
            except UnusableError as error:
                fault, draws = error, draws + 1
                if error.final or not self._is_drawn(body):
                    break
            except (AttributeError, KeyError, IndexError, TypeError, ValueError):
                fault = UnusableError(_error_of(reply))
        with self._lock:
            self.usage.failures += 1
        raise RefusedError(str(fault), fault.text, cut=fault.cut, final=fault.final)

    def _is_drawn(self, body: Mapping[str, Any]) -> bool:
        """Whether the same request may give another answer."""
        return body.get("temperature") != 0 or "temperature" in self._unknown

    def _reply(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A reply's fields, requested without the parameters that the server does not know."""
        import openai

        content = CONTENT[kind]
        limit = body.get("max_tokens", 0)
        rest = {name: value for name, value in body.items() if name not in ("model", content)}
        for name in tuple(self._unknown):
            leave_out(rest, name, limit)
        known: Any = {"model": body["model"], content: body[content]}
        if kind == "embeddings":
            known["encoding_format"] = "float"
        ask: Any = {
            "chat/completions": self._openai.chat.completions.create,
            "completions": self._openai.completions.create,
            "embeddings": self._openai.embeddings.create,
        }[kind]
        while True:
            try:
                reply = ask(**known, extra_body=rest)
                break
            except openai.APITimeoutError:
                raise RefusedError(f"no answer within {self.timeout:g} s") from None
            except openai.APIConnectionError as error:
                raise self._lost(f"it cannot be reached ({error.__cause__ or error})") from None
            except openai.APIStatusError as error:
                name = self._refused(kind, error.status_code, error.response.text, rest)
            except json.JSONDecodeError:
                raise UnusableError("the reply is not JSON") from None
            self._unknown.add(name)
            leave_out(rest, name, limit)
        if not hasattr(reply, "model_dump"):  # the client returns text unchanged
            raise UnusableError("the reply is not JSON")
        fields = reply.model_dump(exclude_unset=True, warnings=False)
        with self._lock:
            self._unreached, self._answered = 0, True
            self.usage.requests += 1
            self.usage.prompt_tokens += tokens_used(fields, "prompt_tokens")
            self.usage.completion_tokens += tokens_used(fields, "completion_tokens")
        return fields

    def _lost(self, reason: str) -> Exception:
        """The error for an unreachable server: final if it never answered or failed often."""
        with self._lock:
            self._unreached += 1
            ended = not self._answered or self._unreached >= 2 * self.workers
        if not ended:
            return RefusedError(reason)
        return UserError(
            f"{self.url}: {reason}; all answers are kept; run the same command again to resume"
        )

    def _refused(self, kind: str, status: int, text: str, parameters: Mapping[str, Any]) -> str:
        """The parameter that the server does not know; anything else is raised."""
        if status in REFUSING:
            raise UserError(f"{self.url}/{kind}: HTTP {status}: {REFUSING[status]}")
        if status in (400, 422) and UNSUPPORTED.search(text):
            for name in parameters:
                if re.search(rf"\b{name}\b", text):
                    if name in NEEDED:
                        raise UserError(
                            f"{self.url}: the server does not support {name}; leave it out"
                        )
                    return name
        raise RefusedError(f"HTTP {status}: {' '.join(text.split())[:200]}".rstrip(": "))


def tokens_used(reply: Mapping[str, Any], name: str) -> int:
    """A count in a reply's `usage`; 0 if the server does not give it."""
    used = reply.get("usage")
    count = used.get(name) if isinstance(used, Mapping) else None
    return count if type(count) is int and count > 0 else 0


def _error_of(reply: Mapping[str, Any]) -> str:
    """Why a reply is broken: some servers report errors with HTTP 200."""
    error = reply.get("error")
    message = error.get("message") if isinstance(error, Mapping) else error
    if not isinstance(message, str) or not message.strip():
        return "the reply is not what was asked for"
    return f"the server reports an error: {' '.join(message.split())[:200]}"


def text_of_choice(choice: Mapping[str, Any], *, plain: bool = False) -> str:
    """The text of a reply, unchanged; text parts are joined.

    Args:
      choice: of a reply's `choices`.
      plain: whether it is a completion, which may be empty.

    Raises:
      UnusableError: there is no text, because of a content filter (also if it truncated the text),
        a refusal, a tool call, or thinking that used all tokens.
    """
    ended = choice.get("finish_reason")
    message = {"content": choice["text"]} if plain else choice["message"]
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):
        refusals = [part["refusal"] for part in content if part.get("type") == "refusal"]
        refusal = refusal or " ".join(refusals)
        texts = [part["text"] for part in content if part.get("type") in ("text", "output_text")]
        content = "".join(texts)
    if content is not None and not isinstance(content, str):
        raise UnusableError("the content of the reply is not text")
    if ended == "content_filter":
        raise UnusableError("the content filter stopped the reply", content or "", final=True)
    if content and (content.strip() or plain):
        return content
    if refusal:
        reason = " ".join(str(refusal).split())[:200]
        raise UnusableError(f"the model refused: {reason}", str(refusal), final=True)
    if ended in ("tool_calls", "function_call") or message.get("tool_calls"):
        raise UnusableError("the model called a tool and wrote no text")
    if ended == "length":
        raise UnusableError(
            "all allowed tokens were used before any text; allow more", cut=True, final=True
        )
    if plain and content is not None and ended != "error":
        return content
    raise UnusableError("the reply has no text")


def leave_out(parameters: dict[str, Any], name: str, limit: int) -> None:
    """Drop a parameter that a server does not know from a request.

    Args:
      parameters: changed in place.
      name: of the parameter.
      limit: largest number of tokens of an answer.
    """
    if parameters.pop(name, None) is not None and name == "max_tokens":
        parameters["max_completion_tokens"] = max(THINKING_TOKENS, 4 * limit)
    if "logprobs" in name:  # they are only valid together
        parameters.pop("logprobs", None)
        parameters.pop("top_logprobs", None)


class RateLimiter:
    """Spaces requests evenly, up to a number per minute.

    Args:
      per_minute: number of requests; None: no limit.
    """

    def __init__(self, per_minute: float | None):
        if per_minute is not None and per_minute <= 0:
            raise UserError(f"requests_per_minute: {per_minute} is not positive")
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, stopped: threading.Event) -> None:
        """Wait until it is this request's turn, or all are stopped."""
        if not self._gap:
            return
        with self._lock:
            mine = max(self._next, time.monotonic())
            self._next = mine + self._gap
        stopped.wait(max(0.0, mine - time.monotonic()))


def split_address(address: str, kind: str) -> tuple[str, str]:
    """Base URL and model of "URL#MODEL".

    A bare host gets the path /v1; a final /chat/completions is removed.

    Args:
      address: as written by the user.
      kind: of the address, for the message.

    Raises:
      UserError: it is not such an address.
    """
    url, _, model = address.partition("#")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or not model:
        raise UserError(
            f"{kind}: openai:{address} is not openai:URL#MODEL, as in "
            "openai:http://localhost:8000/v1#my-model"
        )
    url = url.rstrip("/").removesuffix("/chat/completions")
    return (url if urllib.parse.urlsplit(url).path.strip("/") else f"{url}/v1"), model
