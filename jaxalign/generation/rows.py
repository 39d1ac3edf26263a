"""Rows that are being sampled: their first token, one more token each, until they have ended."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxalign.generation.sampling import (
    Sampling,
    distribution,
    draw,
    mixture,
    most_likely,
    penalised,
)
from jaxalign.generation.weights import DecodingWeights
from jaxalign.models import cached_decoder, cached_encoder_decoder, decoder
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.records import AnyArray, record


@record
class Samples:
    """Responses to prompts, one row each."""

    tokens: Int[AnyArray, "rows response"]
    """The response including its end token, then zeros."""
    length: Int[AnyArray, " rows"]
    """Number of tokens in the response."""
    finished: Bool[AnyArray, " rows"]
    """Whether it ended with an end token or stop string; if not, it was truncated."""
    log_prob: Float[AnyArray, "rows response"]
    """Log-prob of each token in the sampled distribution: mixed, penalised, tempered and truncated;
    in nats, 0 at padding and in greedy decoding."""
    policy_log_probs: Float[AnyArray, "rows policies response"]
    """Log-prob of each token under each policy at temperature 1, not truncated; 0 at padding."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How tokens are sampled, apart from arrays; hashable, since each compiles a program."""

    config: ModelConfig
    """The architecture of all policies."""
    sampling: Sampling
    dtype: Any = None
    """Of the computation and the caches; None: that of the parameters."""

    @property
    def cached(self) -> Any:
        """The module with `prefill` and `advance` of the architecture."""
        return cached_decoder if isinstance(self.config, DecoderConfig) else cached_encoder_decoder


@record
class Source:
    """The arrays from which all rows are sampled.

    Attributes:
      policies: weights of each.
      mixture: weight of each policy in the geometric mixture.
      key: random key.
      stops: from `stop_table`; None: only end tokens end a row.
    """

    policies: list[DecodingWeights]
    mixture: Float[AnyArray, " policies"]
    key: PRNGKeyArray
    stops: Int[AnyArray, "strings states vocabulary"] | None


@record
class Rows:
    """Rows that are being sampled.

    Attributes:
      number: of each row among all; its draws depend on the key, this number and the token's index
        alone.
      samples: what is sampled so far.
      token: the last token of each row.
      matched: how much of each stop string the row ends with, as a state of `stop_table`.
      present: tokens that are already in the row; None: there is no repetition penalty.
      caches: of each policy.
    """

    number: Int[AnyArray, " rows"]
    samples: Samples
    token: Int[AnyArray, " rows"]
    matched: Int[AnyArray, "rows strings"]
    present: Bool[AnyArray, "rows vocabulary"] | None
    caches: list[Any]


@record
class Chosen:
    """Next tokens: their log-probs in the sampled distribution, and under each policy."""

    token: Int[AnyArray, " tokens"]
    log_prob: Float[AnyArray, " tokens"]
    policy_log_probs: Float[AnyArray, "tokens policies"]


@record
class Prefilled:
    """Prompts that every policy has read.

    Attributes:
      hidden: the state after each prompt, by policy.
      caches: of each policy.
      present: as in `Rows`, before the response.
    """

    hidden: list[Float[AnyArray, "prompts width"]]
    caches: list[Any]
    present: Bool[AnyArray, "prompts vocabulary"] | None


def prefill(
    source: Source,
    method: Method,
    prompts: Int[Array, "prompts length"],
    prompt_length: Int[Array, " prompts"],
    *,
    slots: int,
) -> Prefilled:
    """All policies read the prompts.

    Args:
      source: arrays.
      method: settings.
      prompts: padded on the left.
      prompt_length: number of tokens of each, at least 1.
      slots: of the caches, as in `cached_decoder.prefill`.
    """
    read = functools.partial(method.cached.prefill, slots=slots, dtype=method.dtype)
    both = [
        read(policy.params, method.config, prompts, prompt_length) for policy in source.policies
    ]
    present = None
    if method.sampling.repetition_penalty != 1:
        present = _present(method.config, prompts, prompt_length)
    return Prefilled(
        hidden=[hidden for hidden, _ in both], caches=[cache for _, cache in both], present=present
    )


def prefill_rest(
    source: Source,
    method: Method,
    read: Prefilled,
    kept: Int[Array, ""],
    piece: Int[Array, "one length"],
    number: Int[Array, ""],
    present: Bool[Array, "one vocabulary"] | None,
) -> Prefilled:
    """All policies read more of a single prompt, after the first tokens of what they have read.

    Args:
      source: arrays.
      method: settings of a decoder.
      read: a prompt, or the beginning of one.
      kept: number of its tokens that come before the piece.
      piece: tokens padded on the right; `kept` and its size are at most the caches' slots.
      number: how many of its tokens are real, at least 1.
      present: as in `Prefilled`, of the whole prompt.
    """
    both = [
        method.cached.read_more(
            policy.params,
            method.config,
            method.cached.rewound(cache, kept),
            piece,
            number,
            layers=policy.layers,
            dtype=method.dtype,
        )
        for policy, cache in zip(source.policies, read.caches, strict=True)
    ]
    return Prefilled(
        hidden=[hidden for hidden, _ in both], caches=[cache for _, cache in both], present=present
    )


def repeated(prefilled: Prefilled, samples: int) -> Prefilled:
    """Consecutive copies of every prompt."""
    if samples == 1:
        return prefilled
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x, prefilled)


def begin(
    source: Source, method: Method, prefilled: Prefilled, number: Int[Array, " rows"]
) -> Rows:
    """Rows with their first token.

    Args:
      source: arrays.
      method: settings.
      prefilled: one prompt for each row.
      number: as in `Rows`.
    """
    rows, limit = number.shape[0], method.sampling.max_tokens
    empty = Rows(
        number=number,
        samples=Samples(
            tokens=jnp.zeros((rows, limit), jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
            finished=jnp.zeros(rows, bool),
            log_prob=jnp.zeros((rows, limit)),
            policy_log_probs=jnp.zeros((rows, len(source.policies), limit)),
        ),
        token=jnp.zeros(rows, jnp.int32),
        matched=jnp.zeros((rows, 0 if source.stops is None else source.stops.shape[0]), jnp.int32),
        present=prefilled.present,
        caches=prefilled.caches,
    )
    return _with_token(source, method, empty, prefilled.hidden, prefilled.caches)


def active(rows: Rows, method: Method) -> Bool[Array, " rows"]:
    """Which rows get another token."""
    return ~rows.samples.finished & (rows.samples.length < method.sampling.max_tokens)


def step(source: Source, method: Method, rows: Rows) -> Rows:
    """One more token in every active row."""
    moved = [
        method.cached.advance(
            policy.params,
            method.config,
            cache,
            rows.token,
            layers=policy.layers,
            dtype=method.dtype,
        )
        for policy, cache in zip(source.policies, rows.caches, strict=True)
    ]
    hidden, caches = [hidden for hidden, _ in moved], [cache for _, cache in moved]
    return _with_token(source, method, rows, hidden, caches)


def run(source: Source, method: Method, rows: Rows, ended: int | Int[Array, ""]) -> Rows:
    """Sample until so many rows have ended.

    Args:
      source: arrays.
      method: settings.
      rows: with their first token.
      ended: number of rows that are not active at which the loop stops.
    """
    return loop(method, functools.partial(step, source, method), rows, ended)


def loop(
    method: Method, step: Callable[[Rows], Rows], rows: Rows, ended: int | Int[Array, ""]
) -> Rows:
    """`run` with any step."""
    single = rows.number.shape[0] == 1 and isinstance(method.config, DecoderConfig)
    if single:
        rows = _with_caches(rows, map(cached_decoder.without_row_axis, rows.caches))
    rows = jax.lax.while_loop(lambda x: jnp.sum(~active(x, method)) < ended, step, rows)
    return _with_caches(rows, map(cached_decoder.with_row_axis, rows.caches)) if single else rows


def _with_token(
    source: Source, method: Method, rows: Rows, hidden: Sequence[Array], caches: list[Any]
) -> Rows:
    """The rows with a token chosen from the hidden states in every active row."""
    index = rows.samples.length
    chosen = choose(source, method, hidden, number=rows.number, index=index, present=rows.present)
    return append(source, method, dataclasses.replace(rows, caches=caches), chosen)


def append(
    source: Source,
    method: Method,
    rows: Rows,
    chosen: Chosen,
    wanted: bool | Bool[Array, ""] = True,
) -> Rows:
    """The rows with the chosen tokens in every active row.

    Args:
      source: arrays.
      method: settings.
      rows: with the caches of the tokens before the chosen ones.
      chosen: from `choose`.
      wanted: if not, no row gets its token.
    """
    done, before = ~(active(rows, method) & wanted), rows.samples
    token = jnp.where(done, 0, chosen.token)
    limit = method.sampling.max_tokens
    here = (jnp.arange(limit)[None] == before.length[:, None]) & ~done[:, None]
    ends = jnp.asarray(method.sampling.end_tokens, jnp.int32)
    finished = before.finished | (~done & jnp.any(token[:, None] == ends[None], axis=1))
    matched = rows.matched
    if source.stops is not None:
        strings = jnp.arange(source.stops.shape[0])[None]
        after = source.stops[strings, matched, token[:, None]].astype(jnp.int32)
        matched = jnp.where(done[:, None], matched, after)
        whole = jnp.any(matched == source.stops.shape[1] - 1, axis=1)
        finished = finished | whole
    present = rows.present
    if present is not None:
        present = present.at[jnp.arange(len(token)), token].max(~done)
    policy_log_probs = jnp.where(
        here[:, None], chosen.policy_log_probs[:, :, None], before.policy_log_probs
    )
    return dataclasses.replace(
        rows,
        samples=Samples(
            tokens=jnp.where(here, token[:, None], before.tokens),
            length=before.length + ~done,
            finished=finished,
            log_prob=jnp.where(here, chosen.log_prob[:, None], before.log_prob),
            policy_log_probs=policy_log_probs,
        ),
        token=jnp.where(wanted, token, rows.token),
        matched=matched,
        present=present,
    )


def choose(
    source: Source,
    method: Method,
    hidden: Sequence[Float[Array, "tokens width"]],
    *,
    number: Int[Array, " tokens"],
    index: Int[Array, " tokens"],
    present: Bool[Array, "tokens vocabulary"] | None,
) -> Chosen:
    """The next tokens after hidden states.

    Args:
      source: arrays.
      method: settings.
      hidden: states, by policy.
      number: of the row of each, as in `Rows`.
      index: of the chosen token in its response.
      present: as in `Rows`.
    """
    sampling = method.sampling
    logits = [
        decoder.unembed(state, method.config, policy.kernel, policy.bias)
        for state, policy in zip(hidden, source.policies, strict=True)
    ]
    drawn_from = mixture(logits, source.mixture)
    if present is not None:
        drawn_from = penalised(drawn_from, present, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = most_likely(drawn_from)
        log_prob = jnp.zeros(token.shape)
    else:

        def uniform(number: Array, index: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(source.key, number), index)
            return jax.random.uniform(key, (2,))

        uniforms = jax.vmap(uniform)(number, index)
        token, log_prob = draw(distribution(drawn_from, sampling), uniforms)

    def of_token(x: Array) -> Array:
        own = jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]
        return own - jax.nn.logsumexp(x, axis=-1)

    of_policies = jnp.stack([of_token(x) for x in logits], axis=1)
    return Chosen(token=token, log_prob=log_prob, policy_log_probs=of_policies)


def _with_caches(rows: Rows, caches: Any) -> Rows:
    return dataclasses.replace(rows, caches=list(caches))


def _present(config: Any, prompts: Array, prompt_length: Array) -> Bool[Array, "prompts tokens"]:
    """The tokens before a response: the prompt's, or an encoder-decoder's start token."""
    none = jnp.zeros((prompts.shape[0], config.vocab_size), bool)
    if not isinstance(config, DecoderConfig):
        return none.at[:, config.start_token].set(True)
    real = jnp.arange(prompts.shape[1])[None] >= prompts.shape[1] - prompt_length[:, None]
    return none.at[jnp.arange(prompts.shape[0])[:, None], prompts].max(real)
