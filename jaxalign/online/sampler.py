"""Sampling and annotation of responses to a batch of prompts, between two updates."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.batches import PairBatch
from jaxalign.data.tokenizers import Tokenizer, end_id
from jaxalign.errors import UserError
from jaxalign.generation import (
    ResponseText,
    Samples,
    Sampling,
    compile_generate,
    stop_table,
    token_bytes,
)
from jaxalign.models import DecoderConfig
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rewards import RewardFunctions, preference_of
from jaxalign.online.rollouts import PromptBatch, RolloutBatch
from jaxalign.sharding import shard_batch

ROUND = 16
"""Lengths of response rows are rounded up to multiples of this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses of one draw on the host: arrays [prompts, samples, ...], and as texts."""

    tokens: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    log_prob: Mapping[str, np.ndarray]
    """Log-probs of the tokens under each policy of the mixture, by name."""
    texts: list[list[str]]
    drawn: np.ndarray | None = None
    """Log-probs of the tokens in the distribution sampled from; None: they are from the data."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples responses from mixtures of policies and decodes them.

    Attributes:
      config: the policies' architecture.
      tokenizer: of the responses.
      sampling: settings.
      mesh: of the parameters and the batches.
      stop: strings at which a response ends; they are not part of its text.
      dtype: of the computation.
    """

    config: Any
    tokenizer: Tokenizer
    sampling: Sampling
    mesh: Mesh
    stop: Sequence[str] = ()
    dtype: Any = None
    _programs: dict[int, Callable] = field(default_factory=dict)

    @functools.cached_property
    def _stops(self) -> jax.Array | None:
        if not self.stop:
            return None
        tokens = token_bytes(self.tokenizer, self.config.vocab_size)
        return jnp.asarray(stop_table(self.stop, tokens))

    @functools.cached_property
    def _decode(self) -> ResponseText:
        continues = isinstance(self.config, DecoderConfig)
        ends = frozenset((*self.sampling.end_tokens, end_id(self.tokenizer)))
        return ResponseText(self.tokenizer, ends, continues=continues)

    def _program(self, samples: int) -> Callable:
        if samples not in self._programs:
            self._programs[samples] = compile_generate(
                self.config,
                self.mesh,
                samples=samples,
                sampling=self.sampling,
                stops=self._stops,
                dtype=self.dtype,
            )
        return self._programs[samples]

    def __call__(
        self,
        policies: Mapping[str, Mapping[str, Any]],
        mixture: Mapping[str, float],
        prompts: PromptBatch,
        key: jax.Array,
        *,
        samples: int,
    ) -> Sampled:
        """Responses to this process's shard of a batch of prompts.

        Args:
          policies: the parameters of each one, by name.
          mixture: which of them mix, with their weights; one of weight 0 only scores.
          prompts: on the host.
          key: random key.
          samples: number of responses to each prompt.
        """
        out: Samples = self._program(samples)(
            [policies[name] for name in mixture],
            *shard_batch((prompts.tokens, prompts.length), self.mesh),
            key,
            jnp.asarray(list(mixture.values()), jnp.float32),
            0,
        )
        rows = jax.tree.map(own_rows, out)
        tokens = rows.tokens.reshape(-1, samples, rows.tokens.shape[-1])
        length = rows.length.reshape(-1, samples)
        return Sampled(
            tokens=tokens,
            length=length,
            finished=rows.finished.reshape(-1, samples),
            log_prob={
                name: rows.policy_log_probs[:, at].reshape(tokens.shape)
                for at, name in enumerate(mixture)
            },
            texts=[
                [self.text(row[:number]) for row, number in zip(rows_of, numbers, strict=True)]
                for rows_of, numbers in zip(tokens, length, strict=True)
            ],
            drawn=rows.log_prob.reshape(tokens.shape),
        )

    def text(self, tokens: np.ndarray) -> str:
        """The text of a response, as `ResponseText` decodes it."""
        return self._decode(tokens.tolist(), self.stop)


def own_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array on this process's devices."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
    return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])


def from_data(prompts: PromptBatch, responses: Sequence[np.ndarray], sampler: Sampler) -> Sampled:
    """The responses in the prompt data, in the form of samples.

    Args:
      prompts: on the host.
      responses: tokens by number of the prompt; too long ones are truncated.
      sampler: with the length limit and the tokenizer.
    """
    limit = sampler.sampling.max_tokens
    own = [responses[int(at)] for at in prompts.record_index]
    tokens = np.zeros((len(own), 1, limit), np.int32)
    for row, mine in enumerate(own):
        tokens[row, 0, : len(mine)] = mine[:limit]
    length = np.array([[min(len(mine), limit)] for mine in own])
    return Sampled(
        tokens=tokens,
        length=length,
        finished=np.array([[len(mine) <= limit] for mine in own]),
        log_prob={},
        texts=[[sampler.text(mine[:limit])] for mine in own],
    )


def draws_of(algorithm: Algorithm) -> list[tuple[Draw, int]]:
    """The draws, with consecutive equal draws merged: each with the number of its samples."""
    groups: list[tuple[Draw, int]] = []
    for draw in algorithm.draws:
        if groups and groups[-1][0] == draw:
            groups[-1] = draw, groups[-1][1] + 1
        else:
            groups.append((draw, 1))
    return groups


def joined(parts: Sequence[Sampled]) -> Sampled:
    """The responses of all draws side by side."""

    def along(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts], axis=1)

    common = set.intersection(*(set(part.log_prob) for part in parts))

    return Sampled(
        tokens=along("tokens"),
        length=along("length"),
        finished=along("finished"),
        log_prob={
            name: np.concatenate([part.log_prob[name] for part in parts], axis=1)
            for name in sorted(common)
        },
        texts=[
            list(itertools.chain(*rows))
            for rows in zip(*(part.texts for part in parts), strict=True)
        ],
        drawn=None if any(part.drawn is None for part in parts) else along("drawn"),
    )


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """An annotator's verdicts on responses; NaN where there is none."""

    preference: np.ndarray | None = None
    """[prompts, samples, samples]: probability that the first is better; None: not requested."""
    reward: np.ndarray | None = None
    """[prompts, samples]; None: not requested."""
    reasons: Sequence[str] = ()
    """For each prompt, why there is no verdict, or ""."""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[prompts, samples]: the rewards of each reward function by name, without weights."""


def annotate(
    annotator: Any,
    algorithm: Algorithm,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    records: Sequence[Mapping[str, Any]] = (),
) -> Annotated:
    """Request what an algorithm reads: preferences between all pairs, rewards, or nothing.

    Args:
      annotator: `preferences(prompts, first, second)` for preferences; for rewards also
        `rewards(prompts, responses)`. Reward functions give both.
      algorithm: with the kind of annotation.
      prompts: as texts.
      texts: the responses to each.
      records: the fields of each prompt's record, for reward functions.

    Raises:
      UserError: the annotator gives no rewards, and the algorithm needs them.
    """
    number, samples = len(texts), len(texts[0])
    if algorithm.annotation == "none":
        return Annotated()
    if isinstance(annotator, RewardFunctions):
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        fields = [record for record in records for _ in range(samples)]
        scores = annotator(repeated, [text for row in texts for text in row], fields)
        reward = annotator.total(scores).reshape(number, samples)
        by_name = {name: x.reshape(number, samples) for name, x in scores.items()}
        if algorithm.annotation == "rewards":
            return Annotated(reward=reward, reasons=[""] * number, parts=by_name)
        preference = preference_of(reward[:, :, None], reward[:, None, :])
        return Annotated(preference=preference, reasons=[""] * number, parts=by_name)
    if algorithm.annotation == "rewards":
        if not hasattr(annotator, "rewards"):
            raise UserError(
                "rollout.annotator: compares responses and gives no rewards; set a reward model "
                "(reward:FOLDER), a rule of (prompt, response), or --rollout.reward"
            )
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        rewards = annotator.rewards(repeated, [text for row in texts for text in row])
        reward = np.asarray(rewards, np.float64).reshape(number, samples)
        whole = [bool(np.isfinite(row).all()) for row in reward]
        return Annotated(reward=reward, reasons=["" if one else "no reward" for one in whole])
    pairs = list(itertools.combinations(range(samples), 2))
    repeated = [prompt for prompt in prompts for _ in pairs]
    first = [row[i] for row in texts for i, _ in pairs]
    second = [row[j] for row in texts for _, j in pairs]
    verdicts = annotator.preferences(repeated, first, second)
    by_pair = np.asarray(verdicts.preference).reshape(number, len(pairs))
    preference = np.full((number, samples, samples), 0.5)
    for at, (i, j) in enumerate(pairs):
        preference[:, i, j] = by_pair[:, at]
        preference[:, j, i] = 1 - preference[:, i, j]
    why = [verdicts.reasons[at * len(pairs) : (at + 1) * len(pairs)] for at in range(number)]
    return Annotated(preference=preference, reasons=[next(filter(None, row), "") for row in why])


def rollout_batch(
    prompts: PromptBatch,
    sampled: Sampled,
    annotated: Annotated,
    *,
    unfinished_penalty: float = 0.0,
    overlong: float = 0.0,
    importance: bool = False,
    whole: bool = False,
) -> RolloutBatch:
    """Samples and annotations as input of the step; prompts without a verdict have weight 0.

    Args:
      prompts: on the host.
      sampled: the responses.
      annotated: their annotations.
      unfinished_penalty: subtracted from the reward of each truncated response.
      overlong: as in `Algorithm`; see `overlong_penalty`.
      importance: whether the loss reads the tokens' importance weights.
      whole: whether arrays are as wide as the longest response that can be sampled, so that there
        is one shape.
    """
    number, samples, _ = sampled.tokens.shape
    size = sampled.tokens.shape[-1] if whole else int(sampled.length.max())
    size = -(-size // ROUND) * ROUND
    size = min(size, sampled.tokens.shape[-1])
    width = prompts.tokens.shape[1]
    rows = np.zeros((number, samples, width + size), np.int32)
    for at, length in enumerate(prompts.length):
        rows[at, :, :length] = prompts.tokens[at, width - length :]
        for sample in range(samples):
            mine = sampled.length[at, sample]
            rows[at, sample, length : length + mine] = sampled.tokens[at, sample, :mine]
    preference, reward = annotated.preference, annotated.reward
    if preference is None:
        preference = np.full((number, samples, samples), 0.5)
    if reward is None:
        reward = np.zeros((number, samples))
    reward = reward - unfinished_penalty * ~sampled.finished
    reward = reward - overlong_penalty(sampled.length, sampled.tokens.shape[-1], overlong)
    of_policy = sampled.log_prob.get("policy")
    weights = None
    if importance and of_policy is not None and sampled.drawn is not None:
        weights = np.exp(of_policy - sampled.drawn)[:, :, :size].astype(np.float32)
    has_verdict = np.asarray(np.isfinite(preference).all((1, 2)) & np.isfinite(reward).all(1))
    reward = np.where(has_verdict[:, None], reward, 0.0)
    return RolloutBatch(
        responses=PairBatch(
            tokens=rows,
            prompt_length=np.repeat(prompts.length[:, None], samples, axis=1),
            response_tokens=sampled.tokens[:, :, :size],
            response_length=sampled.length.astype(np.int32),
            record_index=prompts.record_index,
            weight=(prompts.weight * has_verdict).astype(np.float32),
        ),
        preference=np.where(has_verdict[:, None, None], preference, 0.5).astype(np.float32),
        reward=reward.astype(np.float32),
        baseline=baselines(reward, prompts.weight * has_verdict).astype(np.float32),
        sampled_log_prob=None if of_policy is None else of_policy[:, :, :size],
        importance=weights,
    )


def overlong_penalty(length: np.ndarray, max_tokens: int, fraction: float) -> np.ndarray:
    r"""DAPO's soft penalty: from 0 to 1 over the last fraction of the longest length.

    .. math:: p = \mathrm{clip}\Bigl(\frac{L - (1 - f) M}{f M}, 0, 1\Bigr)

    Args:
      length: L, of responses in tokens.
      max_tokens: M, the longest.
      fraction: f, in [0, 1]; 0: no penalty.

    References:
      Yu et al., 2025, arXiv:2503.14476, eq. 13.
    """
    if fraction == 0:
        return np.zeros(length.shape)
    buffer = fraction * max_tokens
    return np.clip((length - (max_tokens - buffer)) / buffer, 0, 1)


def baselines(reward: np.ndarray, weight: np.ndarray) -> np.ndarray:
    r"""Mean reward of the other responses: to the same prompt, or of a single one, to all others.

    Args:
      reward: [prompts, samples].
      weight: of each prompt; prompts of weight 0 are ignored.
    """
    samples = reward.shape[1]
    if samples > 1:
        return (reward.sum(1, keepdims=True) - reward) / (samples - 1)
    counted = weight > 0
    others = np.maximum(counted.sum() - counted, 1)
    return (((reward[:, 0] * counted).sum() - reward[:, 0] * counted) / others)[:, None]
