"""A scalar head on any model, for reward models and pairwise preference models.

A decoder is read at the last real token of prompt and response, as transformers'
`*ForSequenceClassification` is. An encoder-decoder's encoder reads the whole row and its decoder
the start token alone: the text-to-text form of arXiv:2312.00886, with one output instead of one
token's logit.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models.compute import Compute
from jaxalign.models.config import ModelConfig
from jaxalign.models.module import Model
from jaxalign.models.responses import last_states
from jaxalign.rows import PackedRows, ResponseRows, SharedPrefixRows

SCORE = "score"
"""Name of the head among a model's parameters."""


def init_head(width: int, key: Array) -> dict[str, Array]:
    r"""A head without bias.

    .. math:: w \sim N(0, 1 / (d + 1)), \quad d \text{ the width}

    Args:
      width: d, of the model's states.
      key: one PRNG key.

    Returns:
      {"kernel": [width, 1]}, float32.

    References:
      Stiennon et al., 2020, arXiv:2009.01325: standard deviation (d + 1) ** -0.5.
    """
    return {"kernel": (width + 1) ** -0.5 * jax.random.normal(key, (width, 1), jnp.float32)}


def with_head(params: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with a scalar head in place of the unembedding."""
    return {name: tree for name, tree in params.items() if name != "unembed"} | {SCORE: head}


def rewards(
    params: Mapping[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    *,
    shared_prefix: SharedPrefixRows | None = None,
    packed: PackedRows | None = None,
    compute: Compute = Compute(),
) -> Float[Array, " rows"]:
    r"""The scalar that a model with a head gives each row of prompt and response.

    .. math:: r(x, y) = w^\top h_{n}(x, y), \quad n \text{ the last real token}

    Args:
      params: nested dict of arrays with the head under `SCORE`.
      config: the architecture.
      tokens: prompt, then response, padded on the right.
      lengths: real tokens of each row, at least 1.
      shared_prefix: as in `ResponseRows`.
      packed: as in `ResponseRows`.
      compute: precision and memory up to the head, which is computed in float32.

    Returns:
      Float32, [rows].
    """
    rows = ResponseRows(
        tokens=tokens,
        prompt_length=lengths,
        response_tokens=tokens[:, :0],
        response_length=jnp.zeros_like(lengths),
        shared_prefix=shared_prefix,
        packed=packed,
    )
    last = last_states(params, config, rows, compute=compute)
    kernel = params[SCORE]["kernel"][:, 0].astype(jnp.float32)
    with jax.named_scope("score"):
        return jnp.matmul(last.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _compiled_rewards(params, config, tokens, lengths, dtype):
    return rewards(params, config, tokens, lengths, compute=Compute(dtype=dtype))


class ScoreModel(Model):
    """A decoder or encoder-decoder with a scalar head, and its parameters."""

    def __call__(self, tokens: Any, lengths: Any) -> Float[Array, " rows"]:
        """Float32 scores [rows] of int32 tokens [rows, length], of which `lengths` are real."""
        rows = jnp.asarray(tokens), jnp.asarray(lengths)
        return _compiled_rewards(self.params, self.config, *rows, self.dtype)
