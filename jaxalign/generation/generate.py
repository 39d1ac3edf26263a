"""Sampling with caches from one policy or a geometric mixture of several, on the devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxalign.errors import UserError
from jaxalign.generation.rows import Method, Samples, Source, begin, prefill, repeated, run
from jaxalign.generation.sampling import Sampling
from jaxalign.generation.weights import prepare
from jaxalign.models import devices
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.sharding import (
    batch_sharding,
    head_sharding,
    replicated,
    state_sharding,
    table_sharding,
)


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
    ended. The draws of a row depend only on the key and the row's number, not on the batch. One
    program is compiled for each shape and setting, and kept for later calls.

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
    return _compiled(
        list(policies),
        prompts,
        prompt_length,
        key,
        jnp.asarray(weights, jnp.float32),
        first_row,
        stops,
        method=Method(config=config, sampling=sampling, dtype=dtype),
        samples=samples,
    )


def _generate(
    policies: Sequence[Mapping[str, Any]],
    prompts: Int[Array, "prompts length"],
    prompt_length: Int[Array, " prompts"],
    key: PRNGKeyArray,
    weights: Float[Array, " policies"],
    first_row: int | Int[Array, ""] | Int[Array, " rows"],
    stops: Int[Array, "strings states vocabulary"] | None,
    *,
    method: Method,
    samples: int,
) -> Samples:
    """`generate` without its check; the whole is one program."""
    config, limit = method.config, method.sampling.max_tokens
    source = Source(
        policies=[prepare(policy, config, method.dtype) for policy in policies],
        mixture=weights,
        key=key,
        stops=stops,
    )
    # An encoder-decoder's cache begins with its start token, which takes one of these slots.
    slots = limit + (prompts.shape[1] if isinstance(config, DecoderConfig) else 0)
    read = repeated(prefill(source, method, prompts, prompt_length, slots=slots), samples)
    rows = prompts.shape[0] * samples
    first = begin(source, method, read, first_row + jnp.arange(rows))
    return run(source, method, first, rows).samples


_compiled = jax.jit(_generate, static_argnames=("method", "samples"))


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
    stops = options.pop("stops", None)
    method = Method(config=config, **options)

    def sampled(policies, prompts, prompt_length, key, weights, first_row):
        _check_positions(config, prompt_length, method.sampling.max_tokens)
        arrays = policies, prompts, prompt_length, key, weights, first_row, stops
        with devices.splitting_states(
            state_sharding(mesh), table_sharding(mesh), head_sharding(mesh)
        ):
            return _generate(*arrays, method=method, samples=samples)

    rows, whole = batch_sharding(mesh), replicated(mesh)
    return jax.jit(
        sampled, in_shardings=(None, rows, rows, whole, whole, whole), out_shardings=rows
    )
