"""A scalar head on any model: what reward models and pairwise preference models are made of.

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

from jaxalign.models.responses import JointRows, adapter_options, response_states
from jaxalign.models.shell import Model

SCORE = "score"
"""Where the head lies among a model's parameters."""


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
    """A model's parameters with a scalar head in the place of the unembedding."""
    return {name: tree for name, tree in params.items() if name != "unembed"} | {SCORE: head}


def rewards(
    params: Mapping[str, Any],
    config: Any,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    *,
    joint: JointRows | None = None,
    remat: str = "none",
    dtype: Any = None,
    **adapters: Any,
) -> Float[Array, " rows"]:
    r"""The scalar that a model with a head gives each row of prompt and response.

    .. math:: r(x, y) = w^\top h_{n}(x, y), \quad n \text{ the last real token}

    Args:
      params: nested dict of arrays with the head under `SCORE`.
      config: `DecoderConfig` or `EncoderDecoderConfig`.
      tokens: prompt and response behind one another, padded on the right.
      lengths: real tokens of each row, at least 1.
      joint: rows 2 i and 2 i + 1 in one, for a decoder: the same numbers with less work.
      remat: what the backward pass computes again, as in `decoder.hidden_states`.
      dtype: of the computation up to the head, which is float32; None is the parameters' own.
      **adapters: as in `response_log_probs`.

    Returns:
      Float32, [rows].
    """
    last = response_states(
        params,
        config,
        tokens,
        lengths,
        jnp.zeros_like(tokens[:, :1]),  # one state a row, at its last token
        joint=joint,
        remat=remat,
        dtype=dtype,
        **adapter_options(**adapters),
    )[:, 0]
    kernel = params[SCORE]["kernel"][:, 0].astype(jnp.float32)
    with jax.named_scope("score"):
        return jnp.matmul(last.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _compiled_rewards(params, config, tokens, lengths, dtype):
    return rewards(params, config, tokens, lengths, dtype=dtype)


class ScoreModel(Model):
    """A decoder or encoder-decoder with a scalar head, and its parameters."""

    def __call__(self, tokens: Any, lengths: Any) -> Float[Array, " rows"]:
        """Float32 scores [rows] of int32 tokens [rows, length], of which `lengths` are real."""
        rows = jnp.asarray(tokens), jnp.asarray(lengths)
        return _compiled_rewards(self.params, self.config, *rows, self.dtype)
