"""Several responses to each prompt, rated by an annotator, and pairs selected from them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from jaxalign.backends import Backend, Decoding, Prompt
from jaxalign.backends.cached import AnswerFile, key_of
from jaxalign.collection.collecting import Collection
from jaxalign.collection.selection import (
    best_and_worst,
    raft_selection,
    ranked_pairs,
    rejection_sampling,
)
from jaxalign.collection.validity import fault
from jaxalign.collection.writing import batches, open_files, write_row
from jaxalign.config import AtLeastOne, Fraction, Positive
from jaxalign.data.records import Text, transcript
from jaxalign.data.written import prompt_fields
from jaxalign.errors import UserError
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.progress import track


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Responses to a prompt."""

    number: int
    """Index of the prompt."""
    prompt: Text
    responses: Sequence[str]
    """Distinct responses: equal samples are one candidate."""
    rewards: Float64[np.ndarray, " responses"]
    """Rewards of a reward model or a rule; else the mean preference over the other candidates."""
    without_reward: int = 0
    """Number of further responses, to which the annotator gave no reward."""


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Select from several samples by an annotator's rewards."""

    annotator: str
    """Annotator that compares samples, as in --judge of `jaxalign judge`: reward:FOLDER, ..."""
    samples: AtLeastOne = 8
    """Number of samples drawn for each prompt."""
    select: Literal["best-worst", "rrhf", "rso", "raft"] = "best-worst"
    """Selection rule: the best and worst sample of each prompt (best-worst), all ranked pairs
    (rrhf), pairs of samples accepted by rejection sampling (rso), or the best samples to imitate,
    in sft.jsonl (raft)."""
    keep: Fraction = 0.2
    """Fraction of the samples to imitate, with raft."""
    ranking: Literal["local", "top"] = "local"
    """Ranking with raft: within each prompt (local) or over all samples (top)."""
    beta: Positive = 0.5
    """Coefficient of the KL term, with rso."""
    accept: AtLeastOne = 4
    """Number of samples accepted for each prompt, with rso."""

    def collect(self, collection: Collection) -> dict[str, Any]:
        """As in `Method`."""
        if self.samples < 2:
            raise UserError("samples: a best and a worst need two or more")
        if collection.decoding.temperature == 0:
            raise UserError("temperature: at 0 all samples are the same; set it above")
        annotator = make_annotator(
            self.annotator, AnnotatorOptions(answers_file=collection.folder / "verdicts.jsonl")
        )
        rng = np.random.default_rng(collection.decoding.seed)
        records, imitated = collection.records, []
        empty_pairs = answered = without_reward = rewarded = 0
        candidates = sampled_candidates(
            collection.model,
            [record.prompt for record in records],
            annotator,
            collection.decoding,
            samples=self.samples,
            batch_size=collection.batch_size,
            kept=(collection.answers, self.annotator),
        )
        for one in track(candidates, "prompts", len(records)):
            answered += 1
            without_reward += one.without_reward
            rewarded += len(one.responses)
            if self.select == "raft":
                imitated += [one] if one.responses else []
                continue
            pairs = self._pairs(one.rewards, rng)
            empty_pairs += not pairs
            for better, worse in pairs:
                provenance = collection.provenance(
                    self.select,
                    records[one.number],
                    annotator=self.annotator,
                    rewards=[float(one.rewards[better]), float(one.rewards[worse])],
                    candidates=len(one.responses),
                )
                collection.pairs.write(
                    one.prompt, one.responses[better], one.responses[worse], provenance
                )
        if without_reward and not rewarded:
            raise UserError(
                f"annotator: {self.annotator} has no reward for any of {without_reward:,} "
                "responses; look at what it returns"
            )
        unanswered = len(records) - answered
        counts: dict[str, Any] = {
            "prompts": len(records),
            "prompts_without_a_pair": empty_pairs + unanswered,
            "prompts_without_a_response": unanswered,
        }
        if without_reward:
            counts["responses_without_a_reward"] = without_reward
        if imitated:
            counts |= self._write_raft(collection.folder, imitated)
            counts["prompts_without_a_pair"] = len(records)
        return counts

    def _pairs(self, rewards: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Indices (better, worse) of the responses to a prompt."""
        if self.select == "rrhf":
            return ranked_pairs(rewards)
        if self.select == "rso":
            chosen = rejection_sampling(rewards, beta=self.beta, number=self.accept, rng=rng)
            twos = [chosen[at : at + 2] for at in range(0, len(chosen) - 1, 2)]
            sides = [sorted(two, key=lambda at: -rewards[at]) for two in twos]
            return [(i, j) for i, j in sides if rewards[i] != rewards[j]]
        pair = best_and_worst(rewards) if len(rewards) else None
        return [pair] if pair else []

    def _write_raft(self, folder: Path, candidates: Sequence[Candidates]) -> dict[str, Any]:
        """Write the responses to imitate; counts of them, and of those that cannot be used."""
        faults: Counter[str] = Counter()
        rewards = np.full((len(candidates), max(len(x.responses) for x in candidates)), -np.inf)
        for at, one in enumerate(candidates):
            rewards[at, : len(one.responses)] = one.rewards
        chosen = raft_selection(rewards, keep=self.keep, ranking=self.ranking)
        chosen = [(at, sample) for at, sample in chosen if np.isfinite(rewards[at, sample])]
        with open_files(folder, "sft") as files:
            for at, sample in chosen:
                prompt, response = candidates[at].prompt, candidates[at].responses[sample]
                if reason := fault(response, transcript(prompt)):
                    faults[reason] += 1
                    continue
                reward = float(rewards[at, sample])
                row = prompt_fields(prompt) | {"response": response, "reward": reward}
                write_row(files["sft"], row)
        return {"sft": len(chosen) - faults.total(), "faults": dict(faults)}


def sampled_candidates(
    backend: Backend,
    prompts: Sequence[Prompt],
    annotator: Any,
    decoding: Decoding,
    *,
    samples: int,
    batch_size: int = 8,
    kept: tuple[AnswerFile, str] | None = None,
) -> Iterator[Candidates]:
    """Sample and rate responses; yields the candidates of one prompt at a time.

    Args:
      backend: model that draws the responses.
      prompts: texts or conversations.
      annotator: has `rewards(prompts, responses)`, or else `preferences(prompts, first, second)`.
      decoding: decoding, with a temperature above 0.
      samples: number of responses to each prompt.
      batch_size: number of prompts in a batch.
      kept: file in which rewards are kept and looked up, and the annotator's name.
    """
    numbered = list(enumerate(prompts))
    for batch in batches(numbered, batch_size):
        answers = backend.generate([prompt for _, prompt in batch], decoding, samples=samples)
        texts = [
            list(dict.fromkeys(one.text for one in row if one.text.strip())) for row in answers
        ]
        rewards = _rewards(annotator, [transcript(prompt) for _, prompt in batch], texts, kept)
        for (number, prompt), responses, values in zip(batch, texts, rewards, strict=True):
            known = np.isfinite(values)
            if responses:
                yield Candidates(
                    number=number,
                    prompt=prompt,
                    responses=[text for text, one in zip(responses, known, strict=True) if one],
                    rewards=values[known],
                    without_reward=int((~known).sum()),
                )


def _rewards(
    annotator: Any,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    kept: tuple[AnswerFile, str] | None,
) -> list[np.ndarray]:
    """Rewards of all responses; those that are in the file are not computed again."""
    keys = [
        key_of("rewards", kept and kept[1], p, list(row))
        for p, row in zip(prompts, texts, strict=True)
    ]
    known = [None if kept is None else kept[0].find(key) for key in keys]
    missing = [at for at, one in enumerate(known) if one is None]
    rated = rewards_of(annotator, [prompts[at] for at in missing], [texts[at] for at in missing])
    for at, rewards in zip(missing, rated, strict=True):
        known[at] = rewards.tolist()
        if kept is not None and np.isfinite(rewards).all():  # else it is requested again
            kept[0].add(keys[at], known[at])
    return [np.array(one, np.float64) for one in known]


def rewards_of(
    annotator: Any, prompts: Sequence[str], texts: Sequence[Sequence[str]]
) -> list[np.ndarray]:
    r"""Rewards of responses; with preferences only, the mean preference over the other responses.

    .. math:: r(y_i) = \frac{1}{n - 1} \sum_{j \neq i} p(y_i \succ y_j)

    Args:
      annotator: as in `sampled_candidates`. A comparison without a verdict counts as a tie; a
        response without any verdict has no reward (NaN).
      prompts: n texts.
      texts: the responses to each prompt.
    """
    if hasattr(annotator, "rewards"):
        repeated = [p for p, row in zip(prompts, texts, strict=True) for _ in row]
        flat = [text for row in texts for text in row]
        values = np.asarray(annotator.rewards(repeated, flat), np.float64) if flat else np.zeros(0)
        return np.split(values, np.cumsum([len(row) for row in texts])[:-1]) if texts else []
    pairs = [(at, i, j) for at, row in enumerate(texts) for i in range(len(row)) for j in range(i)]
    if not pairs:
        return [np.full(len(row), 0.5) for row in texts]
    preferences = annotator.preferences(
        [prompts[at] for at, _, _ in pairs],
        [texts[at][i] for at, i, _ in pairs],
        [texts[at][j] for at, _, j in pairs],
    ).preference
    sums = [np.zeros(len(row)) for row in texts]
    judged = [np.zeros(len(row), bool) for row in texts]
    for (at, i, j), value in zip(pairs, preferences, strict=True):
        if math.isfinite(value):
            judged[at][[i, j]] = True
        preference = value if math.isfinite(value) else 0.5
        sums[at][i] += preference
        sums[at][j] += 1 - preference
    return [
        np.where(known, s / (len(s) - 1), np.nan) if len(s) > 1 else np.full(len(s), 0.5)
        for s, known in zip(sums, judged, strict=True)
    ]
