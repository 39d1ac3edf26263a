"""Requests to OpenAI-compatible servers: what passes, what does not, and how long to wait."""

import json
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from jaxalign.errors import UserError

KEY = "OPENAI_API_KEY"
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
REFUSING = {
    401: f"the key is refused; set {KEY}",
    403: f"access is refused; check {KEY} and what it may use",
    404: "there is no such endpoint or model; check URL and MODEL",
}
LONGEST_WAIT = 60.0  # seconds
UNSUPPORTED = re.compile(r"support|unknown|unrecogni[sz]ed|extra|permitted|not allowed", re.I)
ALWAYS = ("model", "messages", "prompt", "input")  # of a request's fields


class PassingError(Exception):
    """What may go better the next time; how long the server wants to be left alone, if it says."""

    def __init__(self, reason: str, wait: float | None = None, *, unreached: bool = False):
        super().__init__(reason)
        self.reason, self.wait, self.unreached = reason, wait, unreached


class RefusedError(Exception):
    """What would fail again for this request."""


class UnknownParameterError(Exception):
    """A parameter that the server does not know."""

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name, self.reason = name, reason


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


def post(url: str, body: Mapping[str, Any], timeout: float) -> Any:
    """The JSON that a server replies.

    Args:
      url: where to; a redirect is not followed.
      body: sent as JSON, with the key of the environment.
      timeout: seconds.

    Raises:
      PassingError: it may go better later.
      RefusedError: it will not, for this body.
      UnknownParameterError: the server does not know a field of the body.
      UserError: key, URL or model are refused, or there is no such host.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=timeout) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise _refused(url, error, body) from None
    except TimeoutError:
        raise PassingError(f"no answer within {timeout:g} s") from None
    except (urllib.error.URLError, HTTPException, OSError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise PassingError(f"no answer within {timeout:g} s") from None
        if isinstance(cause, socket.gaierror):
            raise UserError(f"{url}: there is no such host; check the URL") from None
        words = getattr(cause, "strerror", None) or cause or type(error).__name__
        raise PassingError(f"it cannot be reached ({words})", unreached=True) from None
    except ValueError:  # neither JSON nor UTF-8
        raise PassingError("the reply is not JSON") from None


def _refused(url: str, error: urllib.error.HTTPError, body: Mapping[str, Any]) -> Exception:
    if error.code in PASSING:
        after = error.headers.get("Retry-After", "")
        return PassingError(f"HTTP {error.code}", float(after) if after.isdigit() else None)
    if error.code in REFUSING:
        return UserError(f"{url}: HTTP {error.code}: {REFUSING[error.code]}")
    try:
        words = error.read(2000).decode(errors="replace")
    except OSError:
        words = ""
    reason = f"HTTP {error.code}: {' '.join(words.split())[:200]}"
    if error.code in (400, 422) and UNSUPPORTED.search(words):
        for name in body:
            if name not in ALWAYS and re.search(rf"\b{name}\b", words):
                return UnknownParameterError(name, reason)
    return RefusedError(reason)


def leave_out(parameters: dict[str, Any], name: str, *, thinking_tokens: int = 1024) -> None:
    """Take a parameter that a server does not know out of those of every request.

    Args:
      parameters: changed in place.
      name: which.
      thinking_tokens: of models that think before they answer, and want another name for the most
        tokens.
    """
    if parameters.pop(name, None) is not None and name == "max_tokens":
        parameters["max_completion_tokens"] = thinking_tokens
    if "logprobs" in name:  # one is of no use without the other
        parameters.pop("logprobs", None)
        parameters.pop("top_logprobs", None)


def wait_before(attempt: int, first_wait: float, wanted: float | None) -> float:
    """Seconds: what the server wants, else twice as long each time, not all at once."""
    doubled = first_wait * 2**attempt * random.uniform(0.5, 1.0)
    return min(max(doubled, wanted or 0.0), LONGEST_WAIT)


class Patience:
    """How often a server that does not answer at all is asked, over all requests."""

    def __init__(self, workers: int):
        self.lock = threading.Lock()
        self.most, self.left, self.answered = 2 * workers, 2 * workers, False
        self.stopped = threading.Event()

    def renew(self) -> None:
        """It has answered."""
        with self.lock:
            self.left, self.answered = self.most, True

    def ended(self, *, last: bool) -> bool:
        """After one more failure: at the last attempt of a first request, or after many."""
        with self.lock:
            self.left -= last
            return self.left <= 0 or (last and not self.answered)


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
