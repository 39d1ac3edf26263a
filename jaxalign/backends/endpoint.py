"""A model behind an OpenAI-compatible endpoint."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxalign.backends.client import (
    Client,
    RefusedError,
    UnusableError,
    Usage,
    split_address,
    text_of_choice,
    tokens_used,
)
from jaxalign.backends.interface import (
    Decoding,
    Generation,
    Keep,
    Prompt,
    Score,
    draw_number,
)
from jaxalign.data.chat_templates import written_arguments
from jaxalign.errors import UserError

EXTRAS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling parameters of vLLM and others that OpenAI's interface lacks, with their defaults."""
NEXT_TOKENS = 20
"""Number of most likely next tokens that are requested where prompts have no log-probs."""


class ChatEndpoint:
    """A model behind HTTP, with many simultaneous requests; a `Backend`.

    Conversations go to /chat/completions, and texts as well, as a user turn. With `completions`,
    texts go to /completions, for base models. Samples are separate requests: not every server
    knows `n`.

    Args:
      address: "URL#MODEL".
      completions: whether texts are continued instead of answered.
      embedding_model: name on the server (default: the same model).
      **options: of `Client`.
    """

    def __init__(
        self,
        address: str,
        *,
        completions: bool = False,
        embedding_model: str | None = None,
        **options: Any,
    ):
        url, self.model = split_address(address, "model")
        self.client = Client(url, **options)
        self.completions, self.embedding_model = completions, embedding_model or self.model
        self._echoes: bool | None = None  # whether prompts have log-probs, once it is known

    @property
    def identity(self) -> str:
        """Endpoint and model."""
        return f"openai {self.client.url} {self.model}{' completions' * self.completions}"

    @property
    def usage(self) -> Usage:
        """Requests and tokens so far."""
        return self.client.usage

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
          UserError: the key, URL or model is refused, or the server cannot be reached.
        """
        results: list[list[Any]] = [[None] * samples for _ in prompts]

        def ask(number: int, stopped: threading.Event) -> Generation:
            at, sample = divmod(number, samples)
            return self._answered(prompts[at], decoding, sample, stopped)

        for number, generation in self.client.together(len(prompts) * samples, ask):
            at, sample = divmod(number, samples)
            results[at][sample] = generation
            if keep is not None and None not in results[at]:
                keep(at, results[at])
        return results

    def _answered(
        self, prompt: Prompt, decoding: Decoding, sample: int, stopped: threading.Event
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
            body["messages"] = [written_arguments(turn) for turn in prompt]
        if decoding.top_p < 1:
            body["top_p"] = decoding.top_p
        extras = {name: getattr(decoding, name) for name in EXTRAS}
        body |= {name: value for name, value in extras.items() if value != EXTRAS[name]}
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if decoding.temperature > 0:
            body["seed"] = draw_number(decoding, prompt, sample)

        def read(reply: Any) -> Generation:
            choice = reply["choices"][0]
            text = text_of_choice(choice, plain=plain)
            cuts = [at for at in map(text.find, decoding.stop) if at >= 0]
            return Generation(
                text=text[: min(cuts)] if cuts else text,
                finished=choice.get("finish_reason") != "length",
                tokens=tokens_used(reply, "completion_tokens"),
            )

        try:
            kind = "completions" if plain else "chat/completions"
            return self.client.ask(kind, body, read, stopped)
        except RefusedError as error:
            return Generation(text="", finished=False, tokens=0, failure=str(error))

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """As in `Backend`, if the server returns log-probs of prompts, as vLLM does.

        If it only returns those of next tokens, as llama.cpp's does, a continuation is one token:
        its log-prob is read off the most likely next tokens, after the space that all continuations
        of a prompt begin with where that is a token by itself. A continuation that is not among
        them has the least of theirs, an upper bound; NaN if no continuation of its prompt is, or if
        one of them begins it, so that it is several tokens.

        Raises:
          UserError: it returns neither, or a prompt is a conversation.
        """
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("score: endpoints only score texts, not conversations")
        texts = [str(prompt) for prompt in prompts]
        if not texts:
            return []
        done: list[Score] = []
        reason: RefusedError | None = None
        try:
            if self._echoes is None:
                try:
                    done = self._echoed(texts[:1], continuations[:1])
                    self._echoes = True
                except RefusedError as error:
                    reason = error
                    if error.final:
                        raise
            if self._echoes:
                return done + self._echoed(texts[len(done) :], continuations[len(done) :])
            scores = self._next_tokens(texts, continuations)
        except RefusedError as error:
            raise UserError(
                f"{self.client.url}: does not return log-probs of texts ({reason or error}); use a "
                "local model"
            ) from None
        self._echoes = False
        return scores

    def _echoed(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """Log-probs of continuations as parts of prompts."""

        def ask(at: int, stopped: threading.Event) -> Score:
            prompt = prompts[at]
            body = {
                "model": self.model,
                "prompt": prompt + continuations[at],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 1,
                "echo": True,
            }

            def read(reply: Any) -> Score:
                scores = reply["choices"][0]["logprobs"]
                end = len(prompt) + len(continuations[at])
                tokens = zip(scores["token_logprobs"], scores["text_offset"], strict=True)
                mine = [(x, offset) for x, offset in tokens if len(prompt) <= offset < end]
                if continuations[at] and not any(offset == len(prompt) for _, offset in mine):
                    raise UnusableError("no token begins where the prompt ends", final=True)
                return Score(log_prob=sum(float(x) for x, _ in mine), tokens=len(mine))

            return self.client.ask("completions", body, read, stopped)

        scores = dict(self.client.together(len(prompts), ask))
        return [scores[at] for at in range(len(prompts))]

    def _next_tokens(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Score]:
        """Log-probs of continuations of one token; each prompt is requested once."""
        options: dict[str, list[str]] = {}
        for prompt, continuation in zip(prompts, continuations, strict=True):
            options.setdefault(prompt, []).append(continuation)
        texts = list(options)

        def ask(at: int, stopped: threading.Event) -> dict[str, float]:
            text, own = texts[at], options[texts[at]]
            found = self._likely(text, stopped)
            if not any(one in found for one in own) and all(one.startswith(" ") for one in own):
                following = self._likely(text + " ", stopped)
                found = {f" {token}": value for token, value in following.items()}
            rest = min(found.values()) if any(one in found for one in own) else math.nan
            longer = {
                one for one in own if any(x and x != one and one.startswith(x) for x in found)
            }
            return {one: found.get(one, math.nan if one in longer else rest) for one in own}

        known = dict(self.client.together(len(texts), ask))
        by_text = {text: known[at] for at, text in enumerate(texts)}
        return [
            Score(log_prob=by_text[prompt][continuation], tokens=1)
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]

    def _likely(self, text: str, stopped: threading.Event) -> dict[str, float]:
        """The most likely next tokens of a text, with their log-probs."""
        body = {
            "model": self.model,
            "prompt": text,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": NEXT_TOKENS,
        }

        def read(reply: Any) -> dict[str, float]:
            scores = reply["choices"][0]["logprobs"]
            if scores.get("content"):  # in the form of chat completions
                rows = scores["content"][0]["top_logprobs"]
                return {row["token"]: float(row["logprob"]) for row in rows}
            return {token: float(value) for token, value in scores["top_logprobs"][0].items()}

        return self.client.ask("completions", body, read, stopped)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """As in `Backend`, by /embeddings.

        Raises:
          UserError: the server has no embeddings.
        """
        if not texts:
            return np.zeros((0, 1), np.float32)
        body = {"model": self.embedding_model, "input": list(texts)}

        def read(reply: Any) -> np.ndarray:
            rows = sorted(reply["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
            numbered = [row["index"] for row in rows] == list(range(len(texts)))
            if not numbered or vectors.ndim != 2 or not np.isfinite(vectors).all():
                raise UnusableError(f"the reply does not hold {len(texts)} vectors of numbers")
            return vectors

        try:
            vectors = self.client.ask("embeddings", body, read)
        except RefusedError as error:
            raise UserError(
                f"{self.client.url}: gives no embeddings ({error}); set another embedder"
            ) from None
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
