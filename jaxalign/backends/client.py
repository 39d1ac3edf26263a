"""OpenAI-compatible servers, asked by the official client: many requests at once, and counted."""

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
"""Of each kind of request, the field that holds what is asked."""
NEEDED = ("top_k", "min_p", "repetition_penalty")
"""Parameters that are not left out: without them, other texts are drawn."""
THINKING_TOKENS = 1024
"""At least, of models that think before they answer and call the most tokens by another name."""


class UnusableError(Exception):
    """A reply that is not what was asked for: why, and what was said instead.

    Args:
      reason: in words.
      said: what the model wrote.
      cut: it was cut off at the most tokens allowed.
      final: the same request will not do better.
    """

    def __init__(
        self,
        reason: str = "the reply is not what was asked for",
        said: str = "",
        *,
        cut: bool = False,
        final: bool = False,
    ):
        super().__init__(reason)
        self.said, self.cut, self.final = said, cut, final


class RefusedError(UnusableError):
    """A request without a usable reply after all attempts."""


@dataclass(kw_only=True)
class Usage:
    """What has been asked for so far, as the server counts it."""

    requests: int = 0
    failures: int = 0
    """Requests without a usable reply after all attempts."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, prices: tuple[float, float]) -> float:
        """In the prices' currency.

        Args:
          prices: of a million prompt tokens, and of a million completion tokens.
        """
        tokens = self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]
        return tokens / 1e6


class Client:
    """A server that is asked over HTTP.

    The package openai sends, waits and tries again where that may help (lost connections, timeouts,
    HTTP 408, 409, 429 and 5xx, as long as the server wants); here is what it leaves open: a reply
    that is not what was asked for is requested again, parameters that a server does not know are
    left out from then on, and a server that is not there ends everything. What a model has written
    at temperature 0 it would write again, and is not requested again.

    Args:
      url: without a path's end, e.g. "http://localhost:8000/v1"; the key is read from the
        environment variable OPENAI_API_KEY.
      workers: requests at a time.
      timeout: seconds for one request.
      attempts: for one request.
      requests_per_minute: None: as many as the workers manage.

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
        self._pace, self._lock = Pace(requests_per_minute), threading.Lock()
        self._unknown: set[str] = set()
        self._unreached, self._answered = 0, False

    def together(
        self, number: int, ask: Callable[[int, threading.Event], T]
    ) -> Iterator[tuple[int, T]]:
        """What `ask` returns for 0, ..., number - 1, as it comes; `workers` at a time.

        Args:
          number: of requests.
          ask: is called in other threads, with the event that they are to stop.
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
        """Ask until there is a reply that can be read.

        Args:
          kind: "chat/completions", "completions" or "embeddings".
          body: of the request.
          read: makes of the reply's fields what is wanted, or raises `UnusableError`; errors of
            fields that are missing or of another type mean a broken reply.
          stopped: set when nobody waits any more.

        Raises:
          RefusedError: there is none after all attempts.
          UserError: key, URL or model are refused, or the server cannot be reached.
        """
        fault, draws = UnusableError("stopped"), 0
        for _ in range(self.attempts):
            self._pace.wait(stopped or threading.Event())
            if stopped is not None and stopped.is_set():
                break
            # a draw that cannot be used would be the same with the same seed
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
        raise RefusedError(str(fault), fault.said, cut=fault.cut, final=fault.final)

    def _is_drawn(self, body: Mapping[str, Any]) -> bool:
        """Whether the same request may have another answer."""
        return body.get("temperature") != 0 or "temperature" in self._unknown

    def _reply(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A reply's fields, asked for without the parameters that the server does not know."""
        import openai

        content = CONTENT[kind]
        most = body.get("max_tokens", 0)
        rest = {name: value for name, value in body.items() if name not in ("model", content)}
        for name in tuple(self._unknown):
            leave_out(rest, name, most)
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
            leave_out(rest, name, most)
        if not hasattr(reply, "model_dump"):  # the client hands text on as it is
            raise UnusableError("the reply is not JSON")
        fields = reply.model_dump(exclude_unset=True, warnings=False)
        with self._lock:
            self._unreached, self._answered = 0, True
            self.usage.requests += 1
            self.usage.prompt_tokens += tokens_used(fields, "prompt_tokens")
            self.usage.completion_tokens += tokens_used(fields, "completion_tokens")
        return fields

    def _lost(self, reason: str) -> Exception:
        """What to raise where a server is not there: of one that never was, or often is not."""
        with self._lock:
            self._unreached += 1
            ended = not self._answered or self._unreached >= 2 * self.workers
        if not ended:
            return RefusedError(reason)
        return UserError(
            f"{self.url}: {reason}; what was answered is kept, and the same command asks for the "
            "rest"
        )

    def _refused(self, kind: str, status: int, words: str, parameters: Mapping[str, Any]) -> str:
        """The parameter that the server does not know; anything else is raised."""
        if status in REFUSING:
            raise UserError(f"{self.url}/{kind}: HTTP {status}: {REFUSING[status]}")
        if status in (400, 422) and UNSUPPORTED.search(words):
            for name in parameters:
                if re.search(rf"\b{name}\b", words):
                    if name in NEEDED:
                        raise UserError(
                            f"{self.url}: the server knows no {name}; ask for text without it"
                        )
                    return name
        raise RefusedError(f"HTTP {status}: {' '.join(words.split())[:200]}".rstrip(": "))


def tokens_used(reply: Mapping[str, Any], name: str) -> int:
    """A count of a reply's `usage`; 0 where the server gives no such number."""
    used = reply.get("usage")
    count = used.get(name) if isinstance(used, Mapping) else None
    return count if type(count) is int and count > 0 else 0


def _error_of(reply: Mapping[str, Any]) -> str:
    """Why a reply is broken: some servers report errors with HTTP 200."""
    error = reply.get("error")
    said = error.get("message") if isinstance(error, Mapping) else error
    if not isinstance(said, str) or not said.strip():
        return "the reply is not what was asked for"
    return f"the server reports an error: {' '.join(said.split())[:200]}"


def text_of_choice(choice: Mapping[str, Any], *, plain: bool = False) -> str:
    """What the model wrote.

    A text that the model wrote is kept as it is; parts of type text are joined.

    Args:
      choice: of a reply's `choices`.
      plain: of a completion, which may be empty: a text can end at once.

    Raises:
      UnusableError: there is no text, and why: a content filter (also one that cut a text off), a
        refusal, a call of a tool, thinking that took all tokens allowed.
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
        said = " ".join(str(refusal).split())[:200]
        raise UnusableError(f"the model refused: {said}", str(refusal), final=True)
    if ended in ("tool_calls", "function_call") or message.get("tool_calls"):
        raise UnusableError("the model called a tool and wrote no text")
    if ended == "length":
        raise UnusableError(
            "the most tokens allowed were used before any text; allow more", cut=True, final=True
        )
    if plain and content is not None and ended != "error":
        return content
    raise UnusableError("the reply has no text")


def leave_out(parameters: dict[str, Any], name: str, most: int) -> None:
    """Take a parameter that a server does not know out of a request.

    Args:
      parameters: changed in place.
      name: which.
      most: tokens of an answer.
    """
    if parameters.pop(name, None) is not None and name == "max_tokens":
        parameters["max_completion_tokens"] = max(THINKING_TOKENS, 4 * most)
    if "logprobs" in name:  # one is of no use without the other
        parameters.pop("logprobs", None)
        parameters.pop("top_logprobs", None)


class Pace:
    """Lets requests pass so many a minute, evenly.

    Args:
      per_minute: requests; None: no limit.
    """

    def __init__(self, per_minute: float | None):
        if per_minute is not None and per_minute <= 0:
            raise UserError(f"requests_per_minute: {per_minute} is not positive")
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, stopped: threading.Event) -> None:
        """Until it is this request's turn, or all are stopped."""
        if not self._gap:
            return
        with self._lock:
            mine = max(self._next, time.monotonic())
            self._next = mine + self._gap
        stopped.wait(max(0.0, mine - time.monotonic()))


def split_address(address: str, kind: str) -> tuple[str, str]:
    """("URL without a path's end", MODEL) of "URL#MODEL".

    A bare host gets the path /v1; one that ends in /chat/completions loses that.

    Args:
      address: as the user wrote it.
      kind: of what it is, for the message.

    Raises:
      UserError: it is no such address.
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
