"""Verdicts on pairs of responses: one interface over whatever gives them."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from jaxalign.data.plain_prompts import Chat
from jaxalign.files import writing

FINEST = 2.0**53  # steps of this inverse below 1 are exact in float64, and so is 1 less of them


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What an annotator says of n comparisons."""

    preference: Float64[np.ndarray, " n"]
    """P(first is better) in [0, 1]; 0.5 is a tie; NaN where no verdict could be had."""
    reasons: tuple[str, ...]
    """Of each comparison: why there is no verdict, else ""."""
    by_order: Float64[np.ndarray, "n orders"] | None = None
    """P(first is better) when it was shown first, and when it was shown second; NaN where not
    asked. None from annotators that know no order."""

    @property
    def failures(self) -> Counter[str]:
        """Number of comparisons without a verdict, by reason."""
        return Counter(filter(None, self.reasons))

    @property
    def order_consistency(self) -> float | None:
        """Share of the comparisons asked in both orders that have the same winner in both."""
        asked = self._asked()
        if asked is None or not len(asked):
            return None
        winner = np.sign(asked - 0.5)
        return float(np.mean(winner[:, 0] == winner[:, 1]))

    @property
    def first_position_rate(self) -> float | None:
        """Mean probability of the response shown first, over both orders; 0.5 has no bias."""
        asked = self._asked()
        if asked is None or not len(asked):
            return None
        return float(np.mean((asked[:, 0] + 1 - asked[:, 1]) / 2))

    def _asked(self) -> np.ndarray | None:
        if self.by_order is None:
            return None
        return self.by_order[np.isfinite(self.by_order).all(1)]


@runtime_checkable
class Annotator(Protocol):
    """Says which of two responses to a prompt is better; order makes no difference to it."""

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """Verdicts on n comparisons.

        Args:
          prompts: n texts.
          first: a response to each.
          second: the other response to each.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of a judge."""

    number: int
    """Which comparison it is about."""
    preference: float
    """P(the response shown first is better); NaN: no verdict."""
    reason: str = ""
    """Why there is no verdict."""
    detail: str = ""
    """What the judge said, word by word."""


@runtime_checkable
class Judge(Protocol):
    """What compares two responses as they are shown: an annotator's inside."""

    @property
    def identity(self) -> str | None:
        """What its answers depend on, to find them again; None: they are not kept."""
        ...

    @property
    def order_free(self) -> bool:
        """Whether f(y, y') = 1 - f(y', y) whatever the two are."""
        ...

    def answers(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[Answer]:
        """An answer to each comparison, in the order in which they come."""
        ...


def as_they_come(answers: Iterable[Answer], total: int) -> Iterable[Answer]:
    """Shows no progress."""
    del total
    return answers


@dataclass(frozen=True, kw_only=True)
class AnnotatorOptions:
    """What kinds of annotators may be told besides their name; each reads what it needs."""

    template: Path | None = None
    """File with {prompt}, {first} and {second}: the question to a language model."""
    tokenizer: str | None = None
    """Folder or hub name (default: the model's)."""
    max_length: int | None = None
    """Most tokens of a question (default: the model's context)."""
    batch_size: int = 8
    """Comparisons at a time, of models that run here."""
    dtype: str = "float32"
    """Of such a model's parameters."""
    reward_rows: Literal["template", "end_token"] | None = None
    """How rows of a reward model from elsewhere end (default: as its chat template writes them)."""
    chat: Chat = "auto"
    """Whether a model reads its tokenizer's chat template; auto: where it has one."""
    workers: int = 8
    """Requests at a time, to an endpoint."""
    timeout: float = 60.0
    """Seconds for a request."""
    attempts: int = 4
    """For each comparison, at an endpoint."""
    answers_file: Path | None = None
    """JSON Lines where answers are kept and found again; None keeps nothing."""
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = as_they_come
    """Put around the answers and their number, to show how far it is."""


@dataclass(frozen=True, kw_only=True)
class JudgeAnnotator:
    r"""An annotator from a judge: both orders are asked and averaged, equal texts are a tie.

    .. math:: p(y \succ y') = \tfrac12 \left(f(y, y') + 1 - f(y', y)\right)

    so that :math:`p(y \succ y') + p(y' \succ y) = 1` exactly, in float64 too. A comparison that
    lacks an answer in one of the orders has no verdict.

    Attributes:
      judge: what is asked.
      answers_file: JSON Lines where every answer is kept as it comes and looked up before asking,
        read once; None keeps nothing.
      progress: put around the answers and their number, to show how far it is.

    References:
      Guo et al. 2024, arXiv:2402.04792, section 3 (both orders averaged).
    """

    judge: Judge
    answers_file: Path | None = None
    progress: Callable[[Iterable[Answer], int], Iterable[Answer]] = as_they_come

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """As in `Annotator`."""
        differ = [at for at, (x, y) in enumerate(zip(first, second, strict=True)) if x != y]
        shown = [(prompts[at], first[at], second[at]) for at in differ]
        if not self.judge.order_free:
            shown += [(prompt, y, x) for prompt, x, y in shown]
        answers = self._asked(shown)
        preference = np.full(len(prompts), 0.5)
        reasons = [""] * len(prompts)
        by_order = np.full((len(prompts), 2), np.nan)
        for number, at in enumerate(differ):
            forward = answers[number]
            if self.judge.order_free:
                preference[at], reasons[at] = forward.preference, forward.reason
                continue
            backward = answers[len(differ) + number]
            by_order[at] = forward.preference, 1 - backward.preference
            half = np.round((forward.preference - backward.preference) * FINEST / 2) / FINEST
            preference[at], reasons[at] = 0.5 + half, forward.reason or backward.reason
        return Verdicts(
            preference=preference,
            reasons=tuple(reasons),
            by_order=None if self.judge.order_free else by_order,
        )

    def _asked(self, shown: Sequence[tuple[str, str, str]]) -> list[Answer]:
        """An answer to each, from the file or the judge; the same question is asked once."""
        identity = self.judge.identity
        kept = {} if identity is None or self.answers_file is None else self._known
        found: dict[bytes, Answer] = {}
        missing = [x for x in dict.fromkeys(shown) if _key(*x) not in kept]
        if missing:
            come = self.judge.answers(*map(list, zip(*missing, strict=True)))
            come = self.progress(come, len(missing))
            with _Appending(self.answers_file if identity else None) as keep:
                for answer in come:
                    prompt, x, y = missing[answer.number]
                    found[_key(prompt, x, y)] = answer
                    if not answer.reason:
                        kept[_key(prompt, x, y)] = answer
                    keep(
                        {
                            "judge": identity,
                            "prompt": prompt,
                            "first": x,
                            "second": y,
                            "preference": answer.preference if not answer.reason else None,
                            "reason": answer.reason,
                            "detail": answer.detail,
                        }
                    )
        return [found.get(key) or kept[key] for key in (_key(*x) for x in shown)]

    @functools.cached_property
    def _known(self) -> dict[bytes, Answer]:
        return _kept(self.answers_file, self.judge.identity)


def _key(prompt: str, first: str, second: str) -> bytes:
    return hashlib.sha256(json.dumps([prompt, first, second]).encode()).digest()


def _kept(path: Path | None, identity: str | None) -> dict[bytes, Answer]:
    """The verdicts of a file that this judge gave; a line cut off by a kill is passed over."""
    kept: dict[bytes, Answer] = {}
    if path is None or identity is None or not path.exists():
        return kept
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                if row["judge"] == identity and row["preference"] is not None:
                    answer = Answer(number=-1, preference=float(row["preference"]))
                    kept[_key(row["prompt"], row["first"], row["second"])] = answer
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                continue
    return kept


class _Appending:
    """Appends rows to a file, each on disk before the next one; nowhere without a file."""

    def __init__(self, path: Path | None):
        self.path = path

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if self.path is None:
            self.file = None
            return lambda row: None
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
        if self.file.tell():
            self.file.seek(-1, 2)
            if self.file.read(1) != b"\n":  # a kill cut the last line off
                self.file.write(b"\n")
        return self._append

    def _append(self, row: dict[str, Any]) -> None:
        assert self.file is not None
        assert self.path is not None
        with writing(self.path):
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
