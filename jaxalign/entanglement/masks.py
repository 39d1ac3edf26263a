"""Token masks: which tokens of two responses the preference is about."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.records import AnyArray

START = 2.0
"""Logit of every learned weight at first: nine tenths of a token count."""


def differing_tokens(
    response_tokens: Int[AnyArray, "pairs 2 response"], response_length: Int[AnyArray, "pairs 2"]
) -> Float[Array, "pairs 2 response"]:
    r"""1 at the tokens that are not in the longest common subsequence of a pair, 0 elsewhere.

    .. math:: F_{ij} = \max(F_{i-1,j}, \; F_{i,j-1}, \; F_{i-1,j-1} + [w_i = l_j])

    The oracle of a sparse preference: what both responses share, in the same order, does not count.
    Of several longest subsequences it is the one whose matches come first.

    Args:
      response_tokens: chosen and rejected, padded on the right.
      response_length: how many of them are real.

    Returns:
      [pairs, 2, response]; zeros throughout where the responses are the same.

    References:
      The idea: Yuan et al., 2024, arXiv:2410.13828, section 5.2.
    """
    return jax.vmap(_differing)(response_tokens, response_length)


def _differing(tokens: Array, length: Array) -> Array:
    room = tokens.shape[1]
    place = jnp.arange(room)
    real = place[None] < length[:, None]
    same = (tokens[0][:, None] == tokens[1][None]) & real[0][:, None] & real[1][None]

    def row(above: Array, matches: Array) -> tuple[Array, Array]:
        longest = jnp.maximum(above[1:], above[:-1] + matches)
        new = jnp.concatenate([above[:1], jax.lax.cummax(longest)])
        return new, new

    first = jnp.zeros(room + 1, jnp.int32)
    _, rows = jax.lax.scan(row, first, same.astype(jnp.int32))
    table = jnp.concatenate([first[None], rows])  # [i, j]: of the first i and the first j tokens

    def back(at: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        i, j = at
        inside = (i > 0) & (j > 0)
        up, left = table[i - 1, j] == table[i, j], table[i, j - 1] == table[i, j]
        match = inside & ~up & ~left
        di = jnp.where(inside, up | match, i > 0)
        dj = jnp.where(inside, ~up, j > 0)
        return (i - di, j - dj), jnp.where(match, jnp.stack([i, j]) - 1, room)

    _, shared = jax.lax.scan(back, (length[0], length[1]), None, length=2 * room)
    found = jnp.zeros((2, room + 1)).at[jnp.arange(2)[:, None], shared.T].set(1.0)[:, :room]
    return jnp.where(real, 1.0 - found, 0.0)


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
    r"""Learned weights in (0, 1) from what precedes a token and from the token itself.

    .. math:: \mu_t = \sigma\left(v \cdot h_t / (\sqrt{d} \, \mathrm{rms}(h_t)) + u_{y_t} + c\right)

    Args:
      head: {"state": v [width], "token": u [vocabulary], "offset": c}.
      states: h, the reference's last hidden states that predict the tokens.
      tokens: y.

    Returns:
      [..., response].

    References:
      The idea: Yuan et al., 2024, arXiv:2410.13828, section 5.2, whose experiments are not
      published; this parametrisation is our own.
    """
    states = states.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(states), axis=-1) + 1e-6)
    of_state = (states @ head["state"]) / (size * jnp.sqrt(states.shape[-1]))
    return jax.nn.sigmoid(of_state + jnp.take(head["token"], tokens) + head["offset"])
