"""A model behind an OpenAI-compatible endpoint."""

import concurrent.futures
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32

from jaxalign.backends.http import (
    Pace,
    PassingError,
    Patience,
    RefusedError,
    UnknownParameterError,
    leave_out,
    post,
    split_address,
    wait_before,
)
from jaxalign.backends.interface import (
    Decoding,
    Generation,
    Keep,
    Prompt,
    Score,
    draw_number,
)
from jaxalign.errors import UserError

T = TypeVar("T")
EXTRAS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Rules of the draw that OpenAI's interface lacks and vLLM's and others' have, with what they are
when nobody asks for them."""


@dataclass(kw_only=True)
class Usage:
    """What a backend has asked for so far, as the server counts it."""

    requests: int = 0
    failures: int = 0
    """Prompts without an answer after all attempts."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, prices: tuple[float, float]) -> float:
        """In the prices' currency.

        Args:
          prices: of a million prompt tokens, and of a million completion tokens.
        """
        tokens = self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]
        return tokens / 1e6


class ChatEndpoint:
    """A model that is asked over HTTP, many prompts at a time; a `Backend`.

    Conversations go to /chat/completions. Texts do, too, as a user's turn; with `completions` they
    go to /completions, to be continued as base models do. Samples are separate requests: not every
    server knows `n`.

    Args:
      address: "URL#MODEL"; the key is read from the environment variable OPENAI_API_KEY.
      completions: texts are continued, not answered.
      embedding_model: as the server calls it (default: the same).
      workers: requests at a time.
      timeout: seconds for one request.
      attempts: for one request, with waits that double between them.
      first_wait: seconds before the second attempt.
      requests_per_minute: None: as many as the workers manage.
    """

    def __init__(
        self,
        address: str,
        *,
        completions: bool = False,
        embedding_model: str | None = None,
        workers: int = 8,
        timeout: float = 120.0,
        attempts: int = 4,
        first_wait: float = 1.0,
        requests_per_minute: float | None = None,
    ):
        self.url, self.model = split_address(address, "model")
        for name, value in (("workers", workers), ("attempts", attempts), ("timeout", timeout)):
            if value <= 0:
                raise UserError(f"{name}: {value} is not positive")
        self.completions, self.embedding_model = completions, embedding_model or self.model
        self.workers, self.timeout, self.attempts = workers, timeout, attempts
        self.first_wait, self.usage = first_wait, Usage()
        self._pace, self._counting = Pace(requests_per_minute), threading.Lock()
        self._unknown: set[str] = set()

    @property
    def identity(self) -> str:
        """Endpoint and model."""
        return f"openai {self.url} {self.model}{' completions' if self.completions else ''}"

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        samples: int = 1,
        keep: Keep | None = None,
    ) -> list[list[Generation]]:
        """As in `Backend`; a prompt that the server refuses has a `failure`.

        Raises:
          UserError: key, URL or model are refused, or the server cannot be reached.
        """
        found: list[list[Any]] = [[None] * samples for _ in prompts]

        def ask(number: int, patience: Patience) -> Generation:
            at, sample = divmod(number, samples)
            return self._answered(prompts[at], decoding, sample, patience)

        def come(number: int, generation: Generation) -> None:
            at, sample = divmod(number, samples)
            found[at][sample] = generation
            if keep is not None and None not in found[at]:
                keep(at, found[at])

        self._together(len(prompts) * samples, ask, come)
        return found

    def _together(
        self, number: int, ask: Callable[[int, Patience], T], come: Callable[[int, T], None]
    ) -> None:
        """Ask many times at once; `come` is told here, in this thread."""
        patience = Patience(self.workers)
        pool = concurrent.futures.ThreadPoolExecutor(self.workers)
        try:
            asked = {pool.submit(ask, at, patience): at for at in range(number)}
            for done in concurrent.futures.as_completed(asked):
                come(asked[done], done.result())
        finally:
            patience.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _answered(
        self, prompt: Prompt, decoding: Decoding, sample: int, patience: Patience
    ) -> Generation:
        plain = isinstance(prompt, str) and self.completions
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
        }
        if plain:
            body["prompt"] = prompt
        elif isinstance(prompt, str):
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["messages"] = list(prompt)
        if decoding.top_p < 1:
            body["top_p"] = decoding.top_p
        wanted = {name: getattr(decoding, name) for name in EXTRAS}
        body |= {name: value for name, value in wanted.items() if value != EXTRAS[name]}
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if decoding.temperature > 0:
            body["seed"] = draw_number(decoding, prompt, sample)
        path = "completions" if plain else "chat/completions"

        def read(reply: Any) -> Generation:
            choice = reply["choices"][0]
            text = str((choice["text"] if plain else choice["message"]["content"]) or "")
            cuts = [at for at in map(text.find, decoding.stop) if at >= 0]
            return Generation(
                text=text[: min(cuts)] if cuts else text,
                finished=choice.get("finish_reason") != "length",
                tokens=int((reply.get("usage") or {}).get("completion_tokens") or 0),
            )

        try:
            return self._persist(path, body, read, patience)
        except RefusedError as error:
            with self._counting:
                self.usage.failures += 1
            return Generation(text="", finished=False, tokens=0, failure=str(error))

    def _persist(
        self, path: str, body: Mapping[str, Any], read: Callable[[Any], T], patience: Patience
    ) -> T:
        """Ask until there is a reply that can be read.

        Raises:
          RefusedError: there is none after all attempts.
        """
        url, reason = f"{self.url}/{path}", "stopped"
        for attempt in range(self.attempts):
            self._pace.wait(patience.stopped)
            if patience.stopped.is_set():
                break
            try:
                return read(self._reply(url, body, patience))
            except PassingError as error:
                reason, wait = error.reason, error.wait
                if error.unreached and patience.ended(last=attempt + 1 == self.attempts):
                    raise UserError(
                        f"{url}: {reason}; what was answered is kept, and the same command asks "
                        "for the rest"
                    ) from None
            except (KeyError, IndexError, TypeError):
                reason, wait = "the reply is not what was asked for", None
            if attempt + 1 < self.attempts:
                patience.stopped.wait(wait_before(attempt, self.first_wait, wait))
        raise RefusedError(reason)

    def _reply(self, url: str, body: Mapping[str, Any], patience: Patience) -> Any:
        """A reply, without the parameters that the server does not know."""
        body = dict(body)
        most = body.get("max_tokens", 0)
        for name in tuple(self._unknown):
            leave_out(body, name, thinking_tokens=4 * most)
        while True:
            try:
                reply = post(url, body, self.timeout)
            except UnknownParameterError as error:
                if error.name in EXTRAS:
                    raise UserError(
                        f"{url}: the server knows no {error.name}; ask for text without it"
                    ) from None
                if error.name not in body:
                    raise RefusedError(error.reason) from None
                self._unknown.add(error.name)
                leave_out(body, error.name, thinking_tokens=4 * most)
                continue
            patience.renew()
            used = reply.get("usage") if isinstance(reply, dict) else None
            with self._counting:
                self.usage.requests += 1
                self.usage.prompt_tokens += int((used or {}).get("prompt_tokens") or 0)
                self.usage.completion_tokens += int((used or {}).get("completion_tokens") or 0)
            return reply

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """As in `Backend`, where the server echoes log-probs of a prompt (vLLM does).

        Raises:
          UserError: it does not, or a prompt is a conversation.
        """
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("score: an endpoint scores texts, not conversations")
        found: list[Any] = [None] * len(prompts)

        def ask(at: int, patience: Patience) -> Score:
            prompt = str(prompts[at])
            body = {
                "model": self.model,
                "prompt": prompt + continuations[at],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 1,
                "echo": True,
            }

            def read(reply: Any) -> Score:
                given = reply["choices"][0]["logprobs"]
                end = len(prompt) + len(continuations[at])
                values = [
                    float(value)
                    for value, offset in zip(
                        given["token_logprobs"], given["text_offset"], strict=True
                    )
                    if len(prompt) <= offset < end
                ]
                return Score(log_prob=sum(values), tokens=len(values))

            try:
                return self._persist("completions", body, read, patience)
            except RefusedError as error:
                raise UserError(
                    f"{self.url}: gives no log-probs of texts ({error}); use a local model for this"
                ) from None

        self._together(len(prompts), ask, found.__setitem__)
        return found

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """As in `Backend`, by /embeddings.

        Raises:
          UserError: the server has none.
        """
        if not texts:
            return np.zeros((0, 1), np.float32)
        body = {"model": self.embedding_model, "input": list(texts)}

        def read(reply: Any) -> np.ndarray:
            rows = sorted(reply["data"], key=lambda row: row["index"])
            return np.array([row["embedding"] for row in rows], np.float32)

        try:
            vectors = self._persist("embeddings", body, read, Patience(1))
        except RefusedError as error:
            raise UserError(
                f"{self.url}: gives no embeddings ({error}); name another embedder"
            ) from None
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
