"""Token masks: weights of the tokens of two responses in a preference loss."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.records import AnyArray

START = 2.0
"""Initial logit of every learned weight, a weight of 0.88."""


def differing_tokens(
    response_tokens: Int[AnyArray, "pairs 2 response"], response_length: Int[AnyArray, "pairs 2"]
) -> Float[Array, "pairs 2 response"]:
    r"""1 at the tokens that are not in the longest common subsequence of a pair, 0 elsewhere.

    .. math:: F_{ij} = \max(F_{i-1,j}, \; F_{i,j-1}, \; F_{i-1,j-1} + [w_i = l_j])

    Tokens that both responses have in the same order do not count. Of several longest common
    subsequences, the one with the earliest matches is used.

    Args:
      response_tokens: chosen and rejected, padded on the right.
      response_length: number of tokens without padding.

    Returns:
      [pairs, 2, response]; all zeros if the responses are the same.

    References:
      The idea: Yuan et al., 2024, arXiv:2410.13828, section 5.2.
    """
    return jax.vmap(_differing)(response_tokens, response_length)


def _differing(tokens: Array, length: Array) -> Array:
    size = tokens.shape[1]
    real = jnp.arange(size)[None] < length[:, None]
    same = (tokens[0][:, None] == tokens[1][None]) & real[0][:, None] & real[1][None]

    def row(above: Array, matches: Array) -> tuple[Array, Array]:
        longest = jnp.maximum(above[1:], above[:-1] + matches)
        new = jnp.concatenate([above[:1], jax.lax.cummax(longest)])
        return new, new

    first = jnp.zeros(size + 1, jnp.int32)
    _, rows = jax.lax.scan(row, first, same.astype(jnp.int32))
    table = jnp.concatenate([first[None], rows])  # [i, j]: of the first i and the first j tokens

    def back(at: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        i, j = at
        inside = (i > 0) & (j > 0)
        up, left = table[i - 1, j] == table[i, j], table[i, j - 1] == table[i, j]
        match = inside & ~up & ~left
        di = jnp.where(inside, up | match, i > 0)
        dj = jnp.where(inside, ~up, j > 0)
        return (i - di, j - dj), jnp.where(match, jnp.stack([i, j]) - 1, size)

    _, shared = jax.lax.scan(back, (length[0], length[1]), None, length=2 * size)
    common = jnp.zeros((2, size + 1)).at[jnp.arange(2)[:, None], shared.T].set(1.0)[:, :size]
    return jnp.where(real, 1.0 - common, 0.0)


def initial_head(width: int, vocabulary: int) -> dict[str, Array]:
    """Parameters of `token_weights` that give every token the same weight."""
    return {
        "state": jnp.zeros(width),
        "token": jnp.zeros(vocabulary),
        "offset": jnp.full((), START),
    }


def token_weights(
    head: Mapping[str, Any],
    states: Float[AnyArray, "*batch response width"],
    tokens: Int[AnyArray, "*batch response"],
) -> Float[Array, "*batch response"]:
    r"""Learned weights in (0, 1), from the hidden state before a token and the token itself.

    .. math:: \mu_t = \sigma\left(v \cdot h_t / (\sqrt{d} \, \mathrm{rms}(h_t)) + u_{y_t} + c\right)

    Args:
      head: {"state": v [width], "token": u [vocabulary], "offset": c}.
      states: h, the reference's last hidden states that predict the tokens.
      tokens: y.

    Returns:
      [..., response].

    References:
      The idea: Yuan et al., 2024, arXiv:2410.13828, section 5.2, which gives no
      parametrisation; this one is our own.
    """
    states = states.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(states), axis=-1) + 1e-6)
    of_state = (states @ head["state"]) / (size * jnp.sqrt(states.shape[-1]))
    return jax.nn.sigmoid(of_state + jnp.take(head["token"], tokens) + head["offset"])
