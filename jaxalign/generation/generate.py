"""Sampling with caches from one policy or a geometric mixture of several, on the devices."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxalign.errors import UserError
from jaxalign.generation.sampling import (
    Sampling,
    distribution,
    draw,
    mixture,
    most_likely,
    penalised,
)
from jaxalign.models import cached_decoder, cached_encoder_decoder, decoder, devices
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.records import AnyArray, record
from jaxalign.sharding import batch_sharding, replicated, state_sharding, table_sharding


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


def generate(
    policies: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    prompts: Int[Array, "prompts length"],
    prompt_length: Int[Array, " prompts"],
    key: PRNGKeyArray,
    *,
    sampling: Sampling,
    weights: Sequence[float] | Float[Array, " policies"] = (1.0,),
    samples: int = 1,
    first_row: int | Int[Array, ""] | Int[Array, " rows"] = 0,
    stops: Int[Array, "strings states vocabulary"] | None = None,
    dtype: Any = None,
) -> Samples:
    r"""Responses sampled token by token from the geometric mixture of policies.

    .. math:: y_n \sim \prod_i \pi_i(y_n \mid x, y_{<n})^{w_i} / Z_n

    Each network reads the prompts once; then all policies decode token by token until every row has
    ended. The draws of a row depend only on the key and the row's number, not on the batch.

    Args:
      policies: parameters of each, with adapters (`lora.with_adapters`) or steering
        (`decoder.with_steering`) where wanted. All have the same tokens.
      config: the architecture of all of them.
      prompts: padded on the left.
      prompt_length: number of tokens of each prompt, at least 1.
      key: random key.
      sampling: settings; with several policies they apply to the mixture.
      weights: of the policies in the mixture; (1 - beta, beta) for policy and reference.
      samples: number of responses to each prompt.
      first_row: number of the first row of this batch among all; or, for each row, its number minus
        its index in the batch.
      stops: from `stop_table`; None: only end tokens end a row.
      dtype: of the computation and the caches; None: that of the parameters.

    Returns:
      Rows in the order of the prompts, `samples` consecutive rows for each.

    Raises:
      UserError: prompt and response are longer than the table of learned positions.
    """
    _check_positions(config, prompt_length, sampling.max_tokens)
    cached: Any = cached_decoder if isinstance(config, DecoderConfig) else cached_encoder_decoder
    slots = sampling.max_tokens + (
        prompts.shape[1] if isinstance(config, DecoderConfig) else 0  # the start token takes 1
    )
    weight = jnp.asarray(weights, jnp.float32)
    rows = prompts.shape[0] * samples
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first_row + jnp.arange(rows))
    started = [
        cached.prefill(policy, config, prompts, prompt_length, slots=slots, dtype=dtype)
        for policy in policies
    ]
    if samples > 1:
        started = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x, started)
    kernels = [decoder.unembedding(policy, config) for policy in policies]
    # On a CPU the loop reads layers sliced once; an accelerator keeps no second copy.
    once = devices.platform() == "cpu"
    layers = [_layers(policy, config) if once else None for policy in policies]
    ends = jnp.asarray(sampling.end_tokens, jnp.int32)
    penalty = sampling.repetition_penalty

    def choose(hiddens: Sequence[Array], at: Array, present: Any) -> tuple[Array, Array, Array]:
        """A token for each row, its log-prob in the sampled distribution, and under each policy."""
        logits = [
            decoder.unembed(hidden, config, *kernel)
            for hidden, kernel in zip(hiddens, kernels, strict=True)
        ]
        drawn_from = mixture(logits, weight)
        if present is not None:
            drawn_from = penalised(drawn_from, present, penalty)
        if sampling.temperature == 0:
            token = most_likely(drawn_from)
            log_prob = jnp.zeros(rows)
        else:
            fold = functools.partial(jax.random.fold_in, data=at)
            uniform = jax.vmap(lambda key: jax.random.uniform(fold(key), (2,)))(row_keys)
            token, log_prob = draw(distribution(drawn_from, sampling), uniform)

        def of_token(x: Array) -> Array:
            own = jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]
            return own - jax.nn.logsumexp(x, axis=-1)

        return token, log_prob, jnp.stack([of_token(x) for x in logits], axis=1)

    def add(carry: Any, hiddens: Sequence[Array]) -> Any:
        """The carry with one more token in every row that has not ended."""
        at, done, matched, present, _, out = carry
        token, log_prob, of_policies = choose(hiddens, at, present)
        token = jnp.where(done, 0, token)
        out = Samples(
            tokens=out.tokens.at[:, at].set(token),
            length=out.length + jnp.where(done, 0, 1),
            finished=out.finished,
            log_prob=out.log_prob.at[:, at].set(jnp.where(done, 0.0, log_prob)),
            policy_log_probs=out.policy_log_probs.at[:, :, at].set(
                jnp.where(done[:, None], 0.0, of_policies)
            ),
        )
        done = done | jnp.any(token[:, None] == ends[None], axis=1)
        if stops is not None:
            strings = jnp.arange(stops.shape[0])[None]
            matched = stops[strings, matched, token[:, None]].astype(jnp.int32)
            done = done | jnp.any(matched == stops.shape[1] - 1, axis=1)
        if present is not None:
            present = present.at[jnp.arange(rows), token].set(True)
        return at + 1, done, matched, present, token, out

    def step(state: Any) -> Any:
        carry, caches = state
        moved = [
            cached.advance(policy, config, cache, carry[4], layers=own, dtype=dtype)
            for policy, cache, own in zip(policies, caches, layers, strict=True)
        ]
        return add(carry, [hidden for hidden, _ in moved]), [cache for _, cache in moved]

    limit = sampling.max_tokens
    nothing = Samples(
        tokens=jnp.zeros((rows, limit), jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
        log_prob=jnp.zeros((rows, limit)),
        policy_log_probs=jnp.zeros((rows, len(policies), limit)),
    )
    matched = jnp.zeros((rows, 0 if stops is None else stops.shape[0]), jnp.int32)
    present = None
    if penalty != 1:
        present = jnp.repeat(_present(config, prompts, prompt_length), samples, axis=0)
    carry = jnp.int32(0), nothing.finished, matched, present, nothing.length, nothing
    carry = add(carry, [hidden for hidden, _ in started])
    state = jax.lax.while_loop(
        lambda state: (state[0][0] < limit) & ~jnp.all(state[0][1]),
        step,
        (carry, [cache for _, cache in started]),
    )
    _, done, _, _, _, out = state[0]
    return Samples(
        tokens=out.tokens,
        length=out.length,
        finished=done,
        log_prob=out.log_prob,
        policy_log_probs=out.policy_log_probs,
    )


def _check_positions(config: Any, prompt_length: Any, limit: int) -> None:
    """Check that the table of learned positions is long enough, if lengths are known."""
    if getattr(config, "position_kind", None) != "learned":
        return
    traced = isinstance(prompt_length, Tracer)
    longest = 1 if traced else int(np.asarray(prompt_length).max())
    if longest + limit > config.context_length:
        raise UserError(
            f"max_tokens: prompts of {longest} tokens and responses of {limit} are more than the "
            f"model's {config.context_length} positions; set {config.context_length - longest}"
            " or fewer"
        )


def _present(config: Any, prompts: Array, prompt_length: Array) -> Bool[Array, "prompts tokens"]:
    """The tokens before a response: the prompt's, or an encoder-decoder's start token."""
    none = jnp.zeros((prompts.shape[0], config.vocab_size), bool)
    if not isinstance(config, DecoderConfig):
        return none.at[:, config.start_token].set(True)
    real = jnp.arange(prompts.shape[1])[None] >= prompts.shape[1] - prompt_length[:, None]
    return none.at[jnp.arange(prompts.shape[0])[:, None], prompts].max(real)


def _layers(policy: Mapping[str, Any], config: Any) -> list[Any]:
    if isinstance(config, DecoderConfig):
        return cached_decoder.layers_of(policy["layers"], config.layers)
    return cached_decoder.layers_of(policy["decoder"]["layers"], config.decoder_layers)


def compile_generate(
    config: Any, mesh: Mesh, *, samples: int = 1, **options: Any
) -> jax.stages.Wrapped:
    """`generate` under `jit` on a mesh, rows split over data and fsdp.

    Args:
      config: the architecture.
      mesh: from `make_mesh`; the prompts of a batch are split over data and fsdp.
      samples: number of responses to each prompt.
      **options: `sampling`, `stops` and `dtype` of `generate`.

    Returns:
      (policies, prompts, prompt_length, key, weights, first_row) -> `Samples`; one program for
      each shape of prompts.
    """

    def run(policies, prompts, prompt_length, key, weights, first_row):
        with devices.splitting_states(state_sharding(mesh), table_sharding(mesh)):
            return generate(
                policies,
                config,
                prompts,
                prompt_length,
                key,
                weights=weights,
                samples=samples,
                first_row=first_row,
                **options,
            )

    rows, whole = batch_sharding(mesh), replicated(mesh)
    return jax.jit(run, in_shardings=(None, rows, rows, whole, whole, whole), out_shardings=rows)
