"""Log-probs of responses after their prompts, and of packed text, for every model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import decoder, devices, encoder_decoder
from jaxalign.models.compute import Compute
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.decoder import Layout, unembedding
from jaxalign.models.head import shifted_head
from jaxalign.models.logprobs import UnembeddingProbe, token_kl, token_log_probs
from jaxalign.models.probes import Spans
from jaxalign.models.sequences import Sequences, sequences_of
from jaxalign.records import AnyArray, record
from jaxalign.rows import PackedRows, ResponseRows, SharedPrefixRows


@record
class ResponseLogProbs:
    """Log-probs of the response tokens and the policy's entropy there, 0 at padding, in nats.

    `collision` is the log-probability that two draws of the next token agree; None: not computed.
    """

    log_prob: Float[Array, "batch response"]
    entropy: Float[Array, "batch response"]
    collision: Float[Array, "batch response"] | None = None


def response_log_probs(
    params: Mapping[str, Any],
    config: ModelConfig,
    rows: ResponseRows,
    *,
    collision: bool = False,
    compute: Compute = Compute(),
) -> ResponseLogProbs:
    """Log-probs of the response tokens; the unembedding is applied at response positions alone.

    Args:
      params: nested dict of arrays; with adapters if wanted (`lora.with_adapters`).
      config: the architecture.
      rows: prompts and responses, as `PairBatch.rows` returns them.
      collision: whether to compute the log-probability that two draws of the next token agree.
      compute: precision and memory.

    Returns:
      Float32 log-probs and entropies, [batch, response], 0 at padding.
    """
    return response_log_probs_and_states(
        params, config, rows, collision=collision, compute=compute
    )[0]


def response_log_probs_and_states(
    params: Mapping[str, Any],
    config: ModelConfig,
    rows: ResponseRows,
    *,
    collision: bool = False,
    compute: Compute = Compute(),
) -> tuple[ResponseLogProbs, Float[Array, "batch response width"]]:
    """`response_log_probs`, and the hidden states that predict each token: what a critic reads."""
    hidden, targets = _scored_states(params, config, rows, compute=compute)
    inputs, kernel, bias = shifted_head(hidden, params, config)
    with jax.named_scope("unembedding"):
        out = token_log_probs(
            inputs,
            kernel,
            targets,
            bias=bias,
            softcap=config.logit_softcap,
            scale=config.logit_scale,
            token_block=compute.token_block,
            vocab_block=compute.vocab_block,
            collision=collision,
            probe=_unembedding_probe(params, config, rows),
        )
    log_probs = ResponseLogProbs(
        log_prob=_masked(out.log_prob, rows),
        entropy=_masked(out.entropy, rows),
        collision=None if out.collision is None else _masked(out.collision, rows),
    )
    return log_probs, _by_response(hidden, rows)


def _masked(x: Float[Array, " tokens"], rows: ResponseRows) -> Float[Array, "batch response"]:
    """A number per response token, 0 at padding."""
    real = jnp.arange(rows.response_tokens.shape[1])[None] < rows.response_length[:, None]
    return jnp.where(real, _by_response(x, rows), 0.0)


def _by_response(
    x: Float[Array, "tokens ..."], rows: ResponseRows
) -> Float[Array, "batch response ..."]:
    """Values of the scored tokens, where each response has its own; anything at padding."""
    shape = rows.response_tokens.shape
    if rows.packed is None:
        return x.reshape(*shape, *x.shape[1:])
    return from_packed(x, rows.packed, shape[1])


def from_packed(
    x: Float[Array, "tokens ..."], packed: PackedRows, size: int
) -> Float[Array, "batch response ..."]:
    """Values of the scored tokens of packed rows, response by response; anything at padding.

    NaN for an example whose packed row is not there.

    Args:
      x: a value for each scored token of all packed rows.
      packed: the rows.
      size: tokens of a response.
    """
    row, found = _row_of(packed)
    start = row * packed.scored_tokens.shape[1] + packed.scored_start.reshape(-1)
    at = start[:, None] + jnp.arange(size)[None]
    values = x[jnp.minimum(at, x.shape[0] - 1)]
    return jnp.where(found.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.nan)


def _row_of(packed: PackedRows) -> tuple[Int[Array, " responses"], Bool[Array, " responses"]]:
    """Which of the packed rows holds each response, and whether one does."""
    is_row = packed.row_number[None] == packed.row[:, None]
    sides = packed.scored_start.shape[1]
    return jnp.repeat(jnp.argmax(is_row, axis=1), sides), jnp.repeat(is_row.any(1), sides)


def _scored_states(
    params: Mapping[str, Any], config: ModelConfig, rows: ResponseRows, *, compute: Compute
) -> tuple[Float[Array, "tokens width"], Int[Array, " tokens"]]:
    """The hidden states that predict the scored tokens, and these tokens."""
    packed = rows.packed
    if packed is None:
        hidden = response_states(params, config, rows, compute=compute)
        return hidden.reshape(-1, hidden.shape[-1]), rows.response_tokens.reshape(-1)
    hidden = _packed_states(params, config, rows, compute=compute)
    states = jnp.take_along_axis(hidden, packed.scored_positions[:, :, None], axis=1)
    states = devices.by_rows(states)
    return states.reshape(-1, states.shape[-1]), packed.scored_tokens.reshape(-1)


def _packed_states(
    params: Mapping[str, Any], config: ModelConfig, rows: ResponseRows, *, compute: Compute
) -> Float[Array, "packed length width"]:
    """The hidden states of packed rows."""
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"config: {config.family} is no decoder; its rows cannot be packed")
    packed = rows.packed
    assert packed is not None
    layout = packed_layout(packed, rows.tokens.shape[1])
    return decoder.hidden_states(params, config, packed.tokens, layout, compute=compute)


def packed_layout(packed: PackedRows, longest: int) -> Layout:
    """Which tokens of packed rows see each other; no prompt with a response is longer."""
    segment, (examples, sides) = packed.segment_ids, packed.last.shape
    if packed.apart:
        examples, sides = examples * sides, 1
    return Layout(
        positions=packed.positions,
        segment_ids=segment,
        prefix_ids=jnp.where(segment > 0, (segment - 1) // 3 * 3 + 1, 0),
        reach=packed.reach,
        sequences=_sequences(segment, examples, sides, longest),
    )


def last_states(
    params: Mapping[str, Any],
    config: ModelConfig,
    rows: ResponseRows,
    *,
    compute: Compute = Compute(),
) -> Float[Array, "batch width"]:
    """The last hidden state of each row, at its last real token.

    Args:
      params: as in `response_log_probs`.
      config: as in `response_log_probs`.
      rows: as in `response_log_probs`.
      compute: as in `response_log_probs`.
    """
    packed = rows.packed
    if packed is None:
        lengths = rows.prompt_length + rows.response_length
        ended = ResponseRows(
            tokens=rows.tokens,
            prompt_length=lengths,
            response_tokens=jnp.zeros_like(rows.tokens[:, :1]),  # one state a row, after it
            response_length=jnp.ones_like(lengths),
            shared_prefix=rows.shared_prefix,
        )
        return response_states(params, config, ended, compute=compute)[:, 0]
    hidden = _packed_states(params, config, rows, compute=compute)
    row, found = _row_of(packed)
    return jnp.where(found[:, None], hidden[row, packed.last.reshape(-1)], jnp.nan)


@record
class ResponseComparison:
    """The policy beside its reference at every response token, [batch, response]; 0 at padding."""

    log_prob: Float[Array, "batch response"]
    reference_log_prob: Float[Array, "batch response"]
    entropy: Float[Array, "batch response"]
    """Of the policy's next-token distribution, in nats; no gradient flows through it."""
    kl: Float[Array, "batch response"]
    """Divergence of the two next-token distributions, in nats."""
    collision: Float[Array, "batch response"] | None = None
    """Log-probability that two draws of the policy's next token agree; None: not computed."""


def compare_responses(
    params: Mapping[str, Any],
    reference_params: Mapping[str, Any],
    config: ModelConfig,
    rows: ResponseRows,
    *,
    reverse: bool = False,
    collision: bool = False,
    compute: Compute = Compute(),
) -> ResponseComparison:
    """Log-probs under policy and reference and their exact divergence, from one pass of each.

    Args:
      params: the policy's nested dict of arrays.
      reference_params: the reference's. No gradient flows to it.
      config: the architecture of both.
      rows: as in `response_log_probs`.
      reverse: KL(reference || policy) instead of KL(policy || reference).
      collision: as in `response_log_probs`, of the policy.
      compute: as in `response_log_probs`.

    Returns:
      Float32, [batch, response], 0 at padding.
    """
    form = {
        "softcap": config.logit_softcap,
        "scale": config.logit_scale,
        "token_block": compute.token_block,
        "vocab_block": compute.vocab_block,
    }

    hidden, targets = _scored_states(params, config, rows, compute=compute)
    kernel, bias = unembedding(params, config)
    states, _ = _scored_states(reference_params, config, rows, compute=compute)
    of_reference = jax.lax.stop_gradient((states, *unembedding(reference_params, config)))
    policy = token_log_probs(hidden, kernel, targets, bias=bias, collision=collision, **form)
    reference = token_log_probs(*of_reference[:2], targets, bias=of_reference[2], **form)
    kl = token_kl(
        hidden,
        kernel,
        *of_reference[:2],
        bias=bias,
        reference_bias=of_reference[2],
        reverse=reverse,
        **form,
    )
    return ResponseComparison(
        log_prob=_masked(policy.log_prob, rows),
        reference_log_prob=_masked(reference.log_prob, rows),
        entropy=_masked(jax.lax.stop_gradient(policy.entropy), rows),
        kl=_masked(kl, rows),
        collision=None if policy.collision is None else _masked(policy.collision, rows),
    )


def embedding_ids(
    config: ModelConfig,
    tokens: Int[AnyArray, "batch length"],
    response_tokens: Int[AnyArray, "batch response"],
) -> Int[AnyArray, "batch ids"]:
    """The ids whose embeddings `response_log_probs` reads."""
    if isinstance(config, DecoderConfig):
        return tokens
    inputs = encoder_decoder.decoder_inputs(config, response_tokens)
    return jnp.concatenate([tokens, inputs], axis=1)


def _unembedding_probe(params, config, rows) -> UnembeddingProbe | None:
    """The probe that `probes` put beside the unembedding."""
    node = params["embed"] if config.tied else params["unembed"]
    if "probe" not in node:
        return None
    gram, spans = node["probe"].gram, node["probe"].spans
    if spans is not None:
        spans = _scored_spans(rows, spans)
    if not config.tied:
        return UnembeddingProbe(gram=gram, spans=spans)
    ids = embedding_ids(config, rows.tokens, rows.response_tokens)
    of_groups = ids.reshape(gram.shape[0], -1)
    return UnembeddingProbe(gram=gram, rows=node["rows"], tokens=of_groups, spans=spans)


def pair_spans(rows: ResponseRows, weight: Float[AnyArray, " pairs"]) -> Spans | None:
    """Where the sides of the pairs lie in packed rows; None: the rows are not packed.

    Args:
      rows: of a batch of pairs; if packed, with its sides apart.
      weight: of the pairs; 0 for copies, which have no tokens of their own.

    Raises:
      ValueError: the packed rows share prefixes.
    """
    packed = rows.packed
    if packed is None:
        return None
    if not packed.apart:
        raise ValueError("rows: the sides of pairs share prefixes; pack them apart")
    length = (rows.prompt_length + rows.response_length).reshape(-1, 2)
    return Spans(
        start=packed.last + 1 - length,
        length=jnp.where(weight[:, None] > 0, length, 0),
        rows=len(packed.tokens),
        longest=rows.tokens.shape[1],
    )


def _scored_spans(rows: ResponseRows, spans: Spans) -> Spans:
    """Where the responses lie among the scored tokens, given where the sides lie in the rows."""
    assert rows.packed is not None
    length = rows.response_length.reshape(-1, 2)
    return Spans(
        start=rows.packed.scored_start,
        length=jnp.where(spans.length > 0, length, 0),
        rows=spans.rows,
        longest=rows.response_tokens.shape[1],
    )


def response_states(
    params: Mapping[str, Any],
    config: ModelConfig,
    rows: ResponseRows,
    *,
    compute: Compute = Compute(),
) -> Float[Array, "batch response width"]:
    """The last hidden states that predict the response, from the last token of the prompt on.

    Args:
      params: as in `response_log_probs`.
      config: the architecture.
      rows: as in `response_log_probs`.
      compute: as in `response_log_probs`.
    """
    if rows.packed is not None:
        return _by_response(_scored_states(params, config, rows, compute=compute)[0], rows)
    tokens, prompt_length, responses = rows.tokens, rows.prompt_length, rows.response_tokens
    if not isinstance(config, DecoderConfig):
        if rows.scored_positions is not None:
            raise ValueError(f"config: {config.family} is no decoder; it scores whole responses")
        return encoder_decoder.response_states(
            params, config, tokens, prompt_length, responses, compute=compute
        )
    positions = predicting_positions(rows)
    layout, ends = None, prompt_length + rows.response_length
    if config.experts is not None:
        layout = Layout(real=jnp.arange(tokens.shape[1])[None] < ends[:, None])
    if rows.shared_prefix is not None:
        layout = _layout(rows.shared_prefix, tokens.shape[1], ends.reshape(-1, 2))
        tokens = rows.shared_prefix.tokens
        positions = _merged_positions(rows.shared_prefix, positions)
    hidden = decoder.hidden_states(params, config, tokens, layout, compute=compute)
    states = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
    return devices.by_rows(states.reshape(*responses.shape, -1))


def predicting_positions(rows: ResponseRows) -> Int[Array, "batch response"]:
    """Where in its row each scored token of padded rows is predicted; anything at padding."""
    positions = rows.scored_positions
    if positions is None:
        positions = rows.prompt_length[:, None] - 1
        positions = positions + jnp.arange(rows.response_tokens.shape[1])[None]
    return jnp.clip(positions, 0, rows.tokens.shape[1] - 1)


def _layout(merged: SharedPrefixRows, length: int, ends: Int[Array, "pairs 2"]) -> Layout:
    """The tokens of either row see the common prefix and each other.

    Args:
      merged: the rows.
      length: of the rows before they were merged, with padding.
      ends: length of both rows without it.
    """
    index = jnp.arange(merged.tokens.shape[1])[None]
    first, common = merged.first_length[:, None], merged.common_length[:, None]
    of_second = index >= first
    position = jnp.where(of_second, index - first + common, index)
    segment = jnp.where(of_second, 3, jnp.where(index < common, 1, 2))
    end = jnp.where(of_second, first + ends[:, 1:] - common, ends[:, :1])
    return Layout(
        positions=jnp.minimum(position, length - 1),
        segment_ids=segment,
        prefix_ids=jnp.ones_like(segment),
        real=index < end,
        sequences=_sequences(segment, len(segment), 2, length),
    )


def _sequences(
    segment: Int[Array, "rows length"], examples: int, sides: int, longest: int
) -> Sequences | None:
    """The sequences of all examples, which a GPU's fused attention takes apart; None elsewhere.

    Each row has an equal part of the examples, or fewer.
    """
    if devices.platform() != "gpu":
        return None
    return sequences_of(segment, examples // len(segment), sides, longest)


def _merged_positions(
    merged: SharedPrefixRows, positions: Int[Array, "rows response"]
) -> Int[Array, "pairs both"]:
    """Where positions of first and second rows, in turn, lie in the merged rows."""
    first, second = positions[0::2], positions[1::2]
    begin, common = merged.first_length[:, None], merged.common_length[:, None]
    second = jnp.where(second < common, second, begin + second - common)
    second = jnp.minimum(second, merged.tokens.shape[1] - 1)
    return jnp.concatenate([first, second], axis=1)


def text_log_probs(
    params: Mapping[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    target_mask: Array,
    *,
    compute: Compute = Compute(),
) -> Float[Array, "rows length"]:
    """Log-prob of each scored token of packed text, from the position before it.

    Args:
      params: as in `response_log_probs`.
      config: the decoder.
      tokens: packed documents.
      segment_ids: 0 at padding; documents 1, 2, ...
      positions: restart at every document.
      target_mask: nonzero where a token is scored; the first of a document never is.
      compute: as in `response_log_probs`.

    Returns:
      Float32, [rows, length], 0 where a token is not scored.
    """
    layout = Layout(segment_ids=segment_ids, positions=positions)
    hidden = decoder.hidden_states(params, config, tokens, layout, compute=compute)
    kernel, bias = unembedding(params, config)
    # All positions rather than all but one: sizes stay round, and the last target is masked.
    targets = jnp.roll(tokens, -1, axis=1)
    out = token_log_probs(
        hidden.reshape(-1, hidden.shape[-1]),
        kernel,
        targets.reshape(-1),
        bias=bias,
        softcap=config.logit_softcap,
        scale=config.logit_scale,
        token_block=compute.token_block,
        vocab_block=compute.vocab_block,
    )
    log_prob = jnp.roll(out.log_prob.reshape(tokens.shape), 1, axis=1)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    scored = (target_mask != 0) & (segment_ids != 0) & (segment_ids == before)
    return jnp.where(scored, log_prob, 0.0)
