"""Answers on disk, so that equal requests are made only once."""

import base64
import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxalign.backends.interface import Backend, Decoding, Generation, Keep, Prompt, Score
from jaxalign.data.records import Conversation
from jaxalign.errors import notice
from jaxalign.files import writing


class AnswerFile:
    """JSON Lines of answers by key, appended one at a time.

    Args:
      path: of the file; a truncated last line is ignored.
    """

    def __init__(self, path: Path):
        self.path, self._lock, self._known = path, threading.Lock(), {}
        if path.exists():
            lost: list[int] = []
            with path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        row = json.loads(line)
                        self._known[row["key"]] = row["answer"]
                    except (ValueError, KeyError, TypeError, RecursionError):
                        if line.endswith("\n"):
                            lost.append(number)
            if lost:
                notice(
                    f"{path}:{lost[0]}: cannot be read ({len(lost)} such lines); these answers "
                    "are requested again"
                )

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> Any:
        """The answer; None: there is none."""
        return self._known.get(key)

    def add(self, key: str, answer: Any, **beside: Any) -> None:
        """Store an answer, with other fields for readers of the file."""
        with self._lock:
            self._known[key] = answer
            line = json.dumps({"key": key, **beside, "answer": answer}).encode() + b"\n"
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+b") as file:
                    if file.tell():
                        file.seek(-1, 2)
                        line = line if file.read(1) == b"\n" else b"\n" + line
                    file.write(line)


def key_of(*parts: Any) -> str:
    """A hash of a request; equal requests have equal keys."""
    tools = [part.tools for part in parts if isinstance(part, Conversation) and part.tools]
    if tools:  # JSON has the turns alone
        parts += (tools,)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Cached:
    """A backend with stored answers, which are used instead of new requests.

    A key has the backend's identity, the prompt and the decoding; failures are not stored.

    Args:
      backend: of new requests.
      answers: stored answers.
    """

    def __init__(self, backend: Backend, answers: AnswerFile):
        self.backend, self.answers = backend, answers
        self.asked = 0
        """Number of prompts and texts that were not stored and were requested."""
        self.failures: Counter[str] = Counter()
        """Number of failed responses, by reason."""

    @property
    def identity(self) -> str:
        """That of the backend."""
        return self.backend.identity

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        samples: int = 1,
        keep: Keep | None = None,
    ) -> list[list[Generation]]:
        """As in `Backend`; equal prompts are requested once."""
        settings = asdict(decoding)
        if decoding.temperature == 0:  # nothing is drawn
            settings["seed"] = 0
        keys = [key_of("generate", self.identity, prompt, settings, samples) for prompt in prompts]
        indices: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            indices.setdefault(key, []).append(index)
        results: dict[str, list[Generation]] = {}

        def add_result(key: str, generations: list[Generation]) -> None:
            results[key] = generations
            if keep is not None:
                for index in indices[key]:
                    keep(index, generations)

        for key in indices:
            if (known := self.answers.find(key)) is not None:
                add_result(key, [Generation(**one) for one in known])
        missing = [key for key in indices if key not in results]
        requested = [prompts[indices[key][0]] for key in missing]

        def keep_answer(at: int, generations: list[Generation]) -> None:
            self.failures.update(one.failure for one in generations if one.failure)
            if not any(one.failure for one in generations):
                answer = [asdict(one) for one in generations]
                self.answers.add(missing[at], answer, prompt=requested[at], decoding=settings)
            add_result(missing[at], generations)

        if requested:
            self.asked += len(requested)
            self.backend.generate(requested, decoding, samples=samples, keep=keep_answer)
        return [results[key] for key in keys]

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """As in `Backend`."""
        asked = list(zip(prompts, continuations, strict=True))
        keys = [key_of("score", self.identity, *pair) for pair in asked]
        known = {
            key: Score(**answer)
            for key in dict.fromkeys(keys)
            if (answer := self.answers.find(key)) is not None
        }
        missing = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in known}
        if missing:
            self.asked += len(missing)
            scores = self.backend.score(*zip(*missing.values(), strict=True))
            for key, score in zip(missing, scores, strict=True):
                known[key] = score
                if math.isfinite(score.log_prob):
                    self.answers.add(key, asdict(score))
        return [known[key] for key in keys]

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """As in `Backend`; vectors are stored as base64 of their float32 bytes."""
        keys = [key_of("embed", self.identity, text) for text in texts]
        missing = {
            key: text
            for key, text in zip(keys, texts, strict=True)
            if self.answers.find(key) is None
        }
        if missing:
            self.asked += len(missing)
            vectors = self.backend.embed(list(missing.values()))
            for key, vector in zip(missing, np.asarray(vectors, "<f4"), strict=True):
                self.answers.add(key, base64.b64encode(vector.tobytes()).decode())
        rows = [np.frombuffer(base64.b64decode(self.answers.find(key)), "<f4") for key in keys]
        return np.stack(rows).astype(np.float32) if rows else self.backend.embed(texts)
