"""Scores of single responses by several aspects, with just-eval's conventions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxalign.backends import BackendOptions, Cached, Decoding, make_backend
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.structured import Asker
from jaxalign.data.reading import BadRecordError, check_text, read_json
from jaxalign.errors import UserError
from jaxalign.evaluation.criteria import FIXED
from jaxalign.evaluation.single_scores import AskedReward, Evaluation, Reward, ScoredReward
from jaxalign.evaluation.verdicts import AnnotatorOptions, Verdicts

QUALITY = FIXED
"""Aspects of ordinary requests; their mean is DRPO's average."""
SAFETY = ("Safety",)
"""The aspect of harmful requests."""


@dataclass(frozen=True, kw_only=True)
class Rated:
    """A response with its scores."""

    key: str
    prompt: str
    response: str
    scores: Mapping[str, float]
    """By aspect, 1 to 5; those that were not given are left out."""
    inapplicable: Sequence[str] = ()
    """Aspects of which the judge said "N/A"."""


@dataclass(frozen=True, kw_only=True)
class AspectTable:
    """Means over responses."""

    means: Mapping[str, float]
    numbers: Mapping[str, int]
    """Scores behind each mean."""
    words: float
    """Mean number of words of a response."""

    @property
    def average(self) -> float:
        """Over the aspects of quality that are there; safety is by itself. DRPO's."""
        return self._over(QUALITY)

    @property
    def leaderboard(self) -> float:
        """Over all six aspects, those that are there; just-eval's."""
        return self._over((*QUALITY, *SAFETY))

    def _over(self, names: Sequence[str]) -> float:
        found = [self.means[name] for name in names if name in self.means]
        return math.fsum(found) / len(found) if found else math.nan


def aspect_table(rows: Sequence[Rated], *, inapplicable: float | None = None) -> AspectTable:
    """The table of one model.

    Args:
      rows: its responses.
      inapplicable: score that "N/A" stands for; None: it counts nowhere. just-eval counts 5, which
        flatters models where an aspect does not apply.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        scores = dict(row.scores)
        if inapplicable is not None:
            scores |= dict.fromkeys(row.inapplicable, inapplicable)
        for name, score in scores.items():
            values.setdefault(name, []).append(score)
    return AspectTable(
        means={name: math.fsum(some) / len(some) for name, some in values.items()},
        numbers={name: len(some) for name, some in values.items()},
        words=float(np.mean([len(row.response.split()) for row in rows])) if rows else math.nan,
    )


def read_judgements(path: Path) -> list[Rated]:
    """The rows of a just-eval file of judgements.

    Args:
      path: JSON list of {id, input, output_cand, parsed_result: {aspect: {score}}}.

    Raises:
      UserError: it is not such a file.
    """
    given = read_json(path)
    try:
        return [
            Rated(
                key=str(row["id"]),
                prompt=check_text(row["input"], "input"),
                response=check_text(row["output_cand"], "output_cand"),
                scores=_scores(row["parsed_result"] or {}),
                inapplicable=_inapplicable(row["parsed_result"] or {}),
            )
            for row in given
        ]
    except (BadRecordError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no just-eval judgements ({error!r})") from None


def _scores(found: Mapping[str, Any]) -> dict[str, float]:
    """Scores that are numbers from 1 to 5; "N/A" and the like are left out."""
    scores = {}
    for name, fields in found.items():
        text = str(fields.get("score")).strip()
        if text in ("1", "2", "3", "4", "5"):
            scores[name.capitalize()] = float(text)
    return scores


def _inapplicable(found: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        name.capitalize()
        for name, fields in found.items()
        if str(fields.get("score")).strip().upper() == "N/A"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreAgreement:
    """Two raters' scores of the same responses, by one aspect."""

    number: int
    equal: float
    """Share of equal scores."""
    distance: float
    """Mean absolute difference."""
    spearman: float
    """Rank correlation, ties at their mean rank; NaN where a rater has one score only."""


def score_agreement(
    ours: Float64[np.ndarray, " n"], theirs: Float64[np.ndarray, " n"]
) -> ScoreAgreement:
    """How far scores agree; responses that one of them has not scored (NaN) are left out.

    Args:
      ours: of one rater.
      theirs: of the other.
    """
    known = np.isfinite(ours) & np.isfinite(theirs)
    x, y = ours[known], theirs[known]
    if not len(x):
        nan = math.nan
        return ScoreAgreement(number=0, equal=nan, distance=nan, spearman=nan)
    ranks = [_ranks(x), _ranks(y)]
    spread = ranks[0].std() * ranks[1].std()
    shared = float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())))
    return ScoreAgreement(
        number=len(x),
        equal=float(np.mean(x == y)),
        distance=float(np.mean(np.abs(x - y))),
        spearman=shared / float(spread) if spread > 0 else math.nan,
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def aspect_reward(name: str, options: AnnotatorOptions | None = None) -> Reward:
    """What scores a response by the aspects of quality and safety.

    Args:
      name: a backend's, which writes scores and reasons, or "scored:FOLDER", whose log-probs of
        the scores are read.
      options: of annotators.
    """
    options = options or AnnotatorOptions()
    kind, _, rest = name.partition(":")
    backend: Any = make_backend(
        rest if kind == "scored" else name,
        BackendOptions(
            tokenizer=options.tokenizer,
            batch_size=options.batch_size,
            dtype=options.dtype,
            chat=options.chat,
            workers=options.workers,
            timeout=options.timeout,
            attempts=options.attempts,
        ),
    )
    if options.answers_file is not None:
        path = options.answers_file.with_name("scores.jsonl")
        backend = Cached(backend, AnswerFile(path))
    criteria = (*QUALITY, *SAFETY)
    if kind == "scored":
        return ScoredReward(backend, criteria=criteria)
    return AskedReward(Asker(backend, Decoding(max_tokens=1024)), criteria=criteria)


@dataclass(frozen=True, kw_only=True)
class AspectAnnotator:
    """Preferences from scores of single responses: the larger mean wins, equal ones are a tie.

    Attributes:
      reward: scores responses.
    """

    reward: Reward

    def rewards(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """Mean scores; NaN where none could be had.

        Args:
          prompts: n texts.
          responses: one to each.
        """
        found = self.reward(prompts, responses)
        return np.array([one.mean for one in found], np.float64)

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """As in `Annotator`; each response is scored once, whichever side it is on."""
        rows = list(zip([*prompts, *prompts], [*first, *second], strict=True))
        once = list(dict.fromkeys(rows))
        scored: list[Evaluation] = self.reward([p for p, _ in once], [y for _, y in once])
        known = dict(zip(once, scored, strict=True))
        sides = [known[row] for row in rows]
        gap = np.array([one.mean for one in sides], np.float64)
        gap = gap[: len(first)] - gap[len(first) :]
        reasons = tuple(
            a.failure or b.failure
            for a, b in zip(sides[: len(first)], sides[len(first) :], strict=True)
        )
        return Verdicts(preference=0.5 + 0.5 * np.sign(gap), reasons=reasons)
