"""Prompts in, sampled and annotated responses out: all that happens between two updates."""

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
from jaxalign.online.rollouts import PromptBatch, RolloutBatch
from jaxalign.sharding import shard_batch

ROUND = 16
"""Responses are scored in rows of a multiple of this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses of one draw on the host: arrays [prompts, samples, ...], and as texts."""

    tokens: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    log_prob: Mapping[str, np.ndarray]
    """Of each token under every policy of the mixture itself, by its name."""
    texts: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws responses from mixtures of policies and reads them as texts.

    Attributes:
      config: the policies' architecture.
      tokenizer: of the responses.
      sampling: rules of the draw.
      mesh: the devices; parameters may lie on another one, and are then handed over.
      stop: texts at which a response stops; they are no part of its text.
      dtype: of the computation.
    """

    config: Any
    tokenizer: Any
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
    def _said(self) -> ResponseText:
        continues = isinstance(self.config, DecoderConfig)
        ends = frozenset((*self.sampling.end_tokens, int(self.tokenizer.eos_token_id)))
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
        """Responses to a batch of prompts (this process's share of them).

        Args:
          policies: the parameters of each one, by name.
          mixture: which of them mix, with their weights; one of weight 0 only scores.
          prompts: on the host.
          key: of the draws.
          samples: responses to each prompt.
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
        )

    def text(self, tokens: np.ndarray) -> str:
        """What a response says, as `ResponseText` reads it."""
        return self._said(tokens.tolist(), self.stop)


def own_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array that this process's devices hold."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
    return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])


def from_data(prompts: PromptBatch, responses: Sequence[np.ndarray], sampler: Sampler) -> Sampled:
    """The responses that stand beside the prompts, as if they had been sampled.

    Args:
      prompts: on the host.
      responses: tokens of each, by the number of its prompt; what is too long is cut.
      sampler: for the longest response and the texts.
    """
    most = sampler.sampling.max_tokens
    own = [responses[int(at)] for at in prompts.record_index]
    tokens = np.zeros((len(own), 1, most), np.int32)
    for row, mine in enumerate(own):
        tokens[row, 0, : len(mine)] = mine[:most]
    length = np.array([[min(len(mine), most)] for mine in own])
    return Sampled(
        tokens=tokens,
        length=length,
        finished=np.array([[len(mine) <= most] for mine in own]),
        log_prob={},
        texts=[[sampler.text(mine[:most])] for mine in own],
    )


def draws_of(algorithm: Algorithm) -> list[tuple[Draw, int]]:
    """Neighbouring draws that are alike are drawn together: each with its number."""
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
    )


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """What an annotator said of responses; NaN where it could not say."""

    preference: np.ndarray | None = None
    """[prompts, samples, samples]: probability that the one beats the other; None: not asked."""
    reward: np.ndarray | None = None
    """[prompts, samples]; None: not asked."""
    reasons: Sequence[str] = ()
    """For each prompt, why there is no verdict, else ""."""


def annotate(
    annotator: Any, algorithm: Algorithm, prompts: Sequence[str], texts: Sequence[Sequence[str]]
) -> Annotated:
    """Ask for what an algorithm reads: preferences between all pairs, rewards, or nothing.

    Args:
      annotator: `preferences(prompts, first, second)` for preferences; for rewards also
        `rewards(prompts, responses)`.
      algorithm: which of them.
      prompts: as texts.
      texts: the responses to each.

    Raises:
      UserError: the annotator gives no rewards, and the algorithm needs them.
    """
    number, samples = len(texts), len(texts[0])
    if algorithm.annotation == "none":
        return Annotated()
    if algorithm.annotation == "rewards":
        if not hasattr(annotator, "rewards"):
            raise UserError(
                "rollout.annotator: it compares responses and gives no rewards; name a reward "
                "model (reward:FOLDER) or a rule of (prompt, response)"
            )
        asked = [prompt for prompt in prompts for _ in range(samples)]
        given = annotator.rewards(asked, [text for row in texts for text in row])
        reward = np.asarray(given, np.float64).reshape(number, samples)
        whole = [bool(np.isfinite(row).all()) for row in reward]
        return Annotated(reward=reward, reasons=["" if one else "no reward" for one in whole])
    pairs = list(itertools.combinations(range(samples), 2))
    asked = [prompt for prompt in prompts for _ in pairs]
    first = [row[i] for row in texts for i, _ in pairs]
    second = [row[j] for row in texts for _, j in pairs]
    verdicts = annotator.preferences(asked, first, second)
    said = np.asarray(verdicts.preference)
    preference = np.full((number, samples, samples), 0.5)
    for at, (i, j) in enumerate(pairs):
        preference[:, i, j] = said.reshape(number, len(pairs))[:, at]
        preference[:, j, i] = 1 - preference[:, i, j]
    why = [verdicts.reasons[at * len(pairs) : (at + 1) * len(pairs)] for at in range(number)]
    return Annotated(preference=preference, reasons=[next(filter(None, row), "") for row in why])


def rollout_batch(
    prompts: PromptBatch,
    sampled: Sampled,
    annotated: Annotated,
    *,
    unfinished_penalty: float = 0.0,
) -> RolloutBatch:
    """Samples and annotations as the step reads them; prompts without a verdict have weight 0.

    Args:
      prompts: on the host.
      sampled: the responses.
      annotated: what was said of them.
      unfinished_penalty: taken from the reward of each response that was cut off.
    """
    number, samples, _ = sampled.tokens.shape
    room = -(-int(sampled.length.max()) // ROUND) * ROUND
    room = min(room, sampled.tokens.shape[-1])
    width = prompts.tokens.shape[1]
    rows = np.zeros((number, samples, width + room), np.int32)
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
    said = np.asarray(np.isfinite(preference).all((1, 2)) & np.isfinite(reward).all(1))
    reward = np.where(said[:, None], reward, 0.0)
    return RolloutBatch(
        responses=PairBatch(
            tokens=rows,
            prompt_length=np.repeat(prompts.length[:, None], samples, axis=1),
            response_tokens=sampled.tokens[:, :, :room],
            response_length=sampled.length.astype(np.int32),
            record_index=prompts.record_index,
            weight=(prompts.weight * said).astype(np.float32),
        ),
        preference=np.where(said[:, None, None], preference, 0.5).astype(np.float32),
        reward=reward.astype(np.float32),
        baseline=baselines(reward, prompts.weight * said).astype(np.float32),
        sampled_log_prob=(
            sampled.log_prob["policy"][:, :, :room] if "policy" in sampled.log_prob else None
        ),
    )


def baselines(reward: np.ndarray, weight: np.ndarray) -> np.ndarray:
    r"""For each response the mean reward of others: to its prompt, or (of one) to other prompts.

    Args:
      reward: [prompts, samples].
      weight: of each prompt; those of weight 0 count for nobody.
    """
    samples = reward.shape[1]
    if samples > 1:
        return (reward.sum(1, keepdims=True) - reward) / (samples - 1)
    counted = weight > 0
    others = np.maximum(counted.sum() - counted, 1)
    return (((reward[:, 0] * counted).sum() - reward[:, 0] * counted) / others)[:, None]
