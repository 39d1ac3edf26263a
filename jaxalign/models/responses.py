"""Log-probs of whole rows: responses after their prompts, and packed text, for every model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models import decoder, devices, encoder_decoder
from jaxalign.models.config import DecoderConfig
from jaxalign.models.logprobs import UnembeddingProbe, token_kl, token_log_probs
from jaxalign.records import AnyArray, record


@record
class JointRows:
    """Two rows in one, so that what both begin with is computed once.

    Attributes:
      tokens: the first row of each pair, then what the second one has after the common tokens, then
        zeros.
      first_length: tokens of the first row.
      common_length: how many tokens at the beginning are the same in both.
    """

    tokens: Int[AnyArray, "pairs joint"]
    first_length: Int[AnyArray, " pairs"]
    common_length: Int[AnyArray, " pairs"]


@record
class ResponseLogProbs:
    """Log-probs of responses' tokens and the policy's entropy there, 0 at padding, in nats."""

    log_prob: Float[Array, "batch response"]
    entropy: Float[Array, "batch response"]


def response_log_probs(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    response_tokens: Int[Array, "batch response"],
    response_length: Int[Array, " batch"],
    *,
    joint: JointRows | None = None,
    remat: str = "none",
    dtype: Any = None,
    entropy_gradient: bool = False,
    token_block: int | None = None,
    vocab_block: int | None = None,
    **adapters: Any,
) -> ResponseLogProbs:
    """Log-probs of the responses' tokens: the unembedding is applied at response positions alone.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      tokens: prompt and response behind one another, padded on the right.
      prompt_length: how many of `tokens` are prompt, at least 1 for a decoder.
      response_tokens: the responses, end-of-sequence included, padded on the right.
      response_length: how many of `response_tokens` are real.
      joint: rows 2 i and 2 i + 1 in one, for a decoder: the same numbers with less work.
      remat: what the backward pass computes again, as in `decoder.hidden_states`.
      dtype: of the computation; None is the parameters' own.
      entropy_gradient: as in `token_log_probs`.
      token_block: as in `token_log_probs`.
      vocab_block: as in `token_log_probs`.
      **adapters: `adapters`, `adapter_scale` as in `decoder.hidden_states`; `adapter_dropout` and
        `dropout_key` as in `lora.with_dropout`; `added` as in `decoder.states_and_keys`.

    Returns:
      Float32 log-probs and entropies, [batch, response], 0 at padding.
    """
    return response_log_probs_and_states(
        params,
        config,
        tokens,
        prompt_length,
        response_tokens,
        response_length,
        joint=joint,
        remat=remat,
        dtype=dtype,
        entropy_gradient=entropy_gradient,
        token_block=token_block,
        vocab_block=vocab_block,
        **adapters,
    )[0]


def response_log_probs_and_states(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    response_tokens: Int[Array, "batch response"],
    response_length: Int[Array, " batch"],
    *,
    joint: JointRows | None = None,
    remat: str = "none",
    dtype: Any = None,
    entropy_gradient: bool = False,
    token_block: int | None = None,
    vocab_block: int | None = None,
    **adapters: Any,
) -> tuple[ResponseLogProbs, Float[Array, "batch response width"]]:
    """`response_log_probs`, and the hidden states that predict each token: what a critic reads."""
    hidden, kernel, bias, form = _response_states(
        params,
        config,
        tokens,
        prompt_length,
        response_tokens,
        joint=joint,
        remat=remat,
        dtype=dtype,
        **adapter_options(**adapters),
    )
    with jax.named_scope("unembedding"):
        out = token_log_probs(
            hidden.reshape(-1, hidden.shape[-1]),
            kernel,
            response_tokens.reshape(-1),
            bias=bias,
            **form,
            entropy_gradient=entropy_gradient,
            token_block=token_block,
            vocab_block=vocab_block,
            probe=_unembedding_probe(params, config, tokens, response_tokens),
        )
    real = jnp.arange(response_tokens.shape[1])[None] < response_length[:, None]

    def masked(x: Array) -> Array:
        return jnp.where(real, x.reshape(real.shape), 0.0)

    return ResponseLogProbs(log_prob=masked(out.log_prob), entropy=masked(out.entropy)), hidden


@record
class ResponseComparison:
    """The policy beside its reference at every response token, [batch, response]; 0 at padding."""

    log_prob: Float[Array, "batch response"]
    reference_log_prob: Float[Array, "batch response"]
    entropy: Float[Array, "batch response"]
    """Of the policy's next-token distribution, in nats; no gradient flows through it."""
    kl: Float[Array, "batch response"]
    """Divergence of the two next-token distributions, in nats."""


def compare_responses(
    params: Mapping[str, Any],
    reference_params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    response_tokens: Int[Array, "batch response"],
    response_length: Int[Array, " batch"],
    *,
    joint: JointRows | None = None,
    reverse: bool = False,
    remat: str = "none",
    dtype: Any = None,
    **adapters: Any,
) -> ResponseComparison:
    """Log-probs under policy and reference and their exact divergence, from one pass of each.

    Args:
      params: the policy's nested dict of arrays.
      reference_params: the reference's; it runs without adapters. No gradient flows to it.
      config: of both.
      tokens: as in `response_log_probs`.
      prompt_length: as in `response_log_probs`.
      response_tokens: as in `response_log_probs`.
      response_length: as in `response_log_probs`.
      joint: as in `response_log_probs`.
      reverse: KL(reference || policy) instead of KL(policy || reference).
      remat: as in `response_log_probs`.
      dtype: as in `response_log_probs`.
      **adapters: of the policy, as in `response_log_probs`.

    Returns:
      Float32, [batch, response], 0 at padding.
    """
    rows = tokens, prompt_length, response_tokens
    how: dict[str, Any] = {"joint": joint, "remat": remat, "dtype": dtype}
    policy = _response_states(params, config, *rows, **how, **adapter_options(**adapters))
    reference = jax.lax.stop_gradient(_response_states(reference_params, config, *rows, **how)[:3])
    hidden, kernel, bias, form = policy
    targets = response_tokens.reshape(-1)

    def flat(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])

    of_policy = token_log_probs(flat(hidden), kernel, targets, bias=bias, **form)
    of_reference = token_log_probs(
        flat(reference[0]), reference[1], targets, bias=reference[2], **form
    ).log_prob
    kl = token_kl(
        flat(hidden),
        kernel,
        flat(reference[0]),
        reference[1],
        bias=bias,
        reference_bias=reference[2],
        reverse=reverse,
        **form,
    )
    real = jnp.arange(response_tokens.shape[1])[None] < response_length[:, None]

    def masked(x: Array) -> Array:
        return jnp.where(real, x.reshape(real.shape), 0.0)

    return ResponseComparison(
        log_prob=masked(of_policy.log_prob),
        reference_log_prob=masked(of_reference),
        entropy=masked(jax.lax.stop_gradient(of_policy.entropy)),
        kl=masked(kl),
    )


def looked_up(
    config: Any, tokens: Int[Array, "batch length"], response_tokens: Int[Array, "batch response"]
) -> Int[Array, "batch looked_up"]:
    """The tokens whose embeddings `response_log_probs` reads."""
    if isinstance(config, DecoderConfig):
        return tokens
    inputs = encoder_decoder.decoder_inputs(config, response_tokens)
    return jnp.concatenate([tokens, inputs], axis=1)


def _unembedding_probe(params, config, tokens, response_tokens) -> UnembeddingProbe | None:
    """What `probes` put beside the matrix that makes logits."""
    node = params["embed"] if config.tied else params["unembed"]
    if "probe" not in node:
        return None
    if not config.tied:
        return UnembeddingProbe(gram=node["probe"])
    of_pairs = looked_up(config, tokens, response_tokens).reshape(node["probe"].shape[0], -1)
    return UnembeddingProbe(gram=node["probe"], rows=node["rows"], tokens=of_pairs)


def adapter_options(
    *, adapters=None, adapter_scale=1.0, adapter_dropout: float = 0.0, dropout_key=None, added=None
) -> dict[str, Any]:
    """The models' own keywords; dropout travels inside the adapters."""
    steered = {} if added is None else {"added": added}
    if adapters is None:
        return steered
    if adapter_dropout and dropout_key is not None:
        from jaxalign.models.lora import with_dropout

        adapters = with_dropout(adapters, dropout_key, rate=adapter_dropout)
    return {"adapters": adapters, "adapter_scale": adapter_scale} | steered


def _response_states(
    params, config, tokens, prompt_length, response_tokens, **options
) -> tuple[Array, Array, Array | None, dict[str, Any]]:
    """Hidden states that predict the response [batch, response, width]; how logits follow."""
    hidden = response_states(params, config, tokens, prompt_length, response_tokens, **options)
    room: Any = decoder if isinstance(config, DecoderConfig) else encoder_decoder
    kernel, bias = room.unembedding(params, config)
    return hidden, kernel, bias, {"softcap": config.logit_softcap, "scale": config.logit_scale}


def response_states(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    response_tokens: Int[Array, "batch response"],
    *,
    joint: JointRows | None = None,
    **options: Any,
) -> Float[Array, "batch response width"]:
    """The last hidden states that predict the response, from the last token of the prompt on.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      tokens: as in `response_log_probs`.
      prompt_length: as in `response_log_probs`.
      response_tokens: as in `response_log_probs`.
      joint: as in `response_log_probs`.
      **options: those of the model's `hidden_states`.
    """
    if not isinstance(config, DecoderConfig):
        rows = tokens, prompt_length, response_tokens
        return encoder_decoder.response_states(params, config, *rows, **options)
    places = prompt_length[:, None] - 1 + jnp.arange(response_tokens.shape[1])[None]
    places = jnp.clip(places, 0, tokens.shape[1] - 1)
    if joint is None:
        hidden = decoder.hidden_states(params, config, tokens, **options)
    else:
        hidden = _joint_states(params, config, joint, tokens.shape[1], **options)
        places = _places_in_joint(joint, places)
    states = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    return devices.by_rows(states.reshape(*response_tokens.shape, -1))


def _joint_states(params, config, joint: JointRows, length: int, **options) -> Array:
    """Hidden states of joint rows: either row's own tokens see the common ones and themselves."""
    place = jnp.arange(joint.tokens.shape[1])[None]
    first, common = joint.first_length[:, None], joint.common_length[:, None]
    of_second = place >= first
    position = jnp.where(of_second, place - first + common, place)
    segment = jnp.where(of_second, 3, jnp.where(place < common, 1, 2))
    return decoder.hidden_states(
        params,
        config,
        joint.tokens,
        positions=jnp.minimum(position, length - 1),
        segment_ids=segment,
        prefix_ids=jnp.ones_like(segment),
        **options,
    )


def _places_in_joint(joint: JointRows, places: Array) -> Int[Array, "pairs places"]:
    """Where the places of first and second rows, in turn, lie in joint rows."""
    first, second = places[0::2], places[1::2]
    begin, common = joint.first_length[:, None], joint.common_length[:, None]
    second = jnp.where(second < common, second, begin + second - common)
    second = jnp.minimum(second, joint.tokens.shape[1] - 1)
    return jnp.concatenate([first, second], axis=1)


def text_log_probs(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "rows length"],
    segment_ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    target_mask: Array,
    *,
    remat: str = "none",
    dtype: Any = None,
    token_block: int | None = None,
    vocab_block: int | None = None,
    **adapters: Any,
) -> Float[Array, "rows length"]:
    """Log-prob of each scored token of packed text, from the position before it.

    Args:
      params: nested dict of arrays.
      config: `DecoderConfig`.
      tokens: packed documents.
      segment_ids: 0 at padding; documents 1, 2, ...
      positions: restart at every document.
      target_mask: nonzero where a token is scored; the first of a document never is.
      remat: as in `decoder.hidden_states`.
      dtype: as in `decoder.hidden_states`.
      token_block: as in `token_log_probs`.
      vocab_block: as in `token_log_probs`.
      **adapters: `adapters`, `adapter_scale` as in `decoder.hidden_states`; `adapter_dropout` and
        `dropout_key` as in `lora.with_dropout`.

    Returns:
      Float32, [rows, length], 0 where a token is not scored.
    """
    hidden = decoder.hidden_states(
        params,
        config,
        tokens,
        segment_ids=segment_ids,
        positions=positions,
        remat=remat,
        dtype=dtype,
        **adapter_options(**adapters),
    )
    kernel, bias = decoder.unembedding(params, config)
    # All positions rather than all but one: sizes stay round, and the last target is masked.
    targets = jnp.roll(tokens, -1, axis=1)
    out = token_log_probs(
        hidden.reshape(-1, hidden.shape[-1]),
        kernel,
        targets.reshape(-1),
        bias=bias,
        softcap=config.logit_softcap,
        scale=config.logit_scale,
        token_block=token_block,
        vocab_block=vocab_block,
    )
    log_prob = jnp.roll(out.log_prob.reshape(tokens.shape), 1, axis=1)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    scored = (target_mask != 0) & (segment_ids != 0) & (segment_ids == before)
    return jnp.where(scored, log_prob, 0.0)
