"""Losses on hidden states: the distance to target states."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

States = Float[Array, "rows layers positions width"]


def shifted_states(base: States, difference: States, *, alpha: float) -> States:
    r"""Target states: those of the base model, moved along a difference.

    .. math:: h^* = h_{base} + \alpha \, v, \quad v = h_+ - h_-

    Args:
      base: hidden states of the base model under the plain prompt, [rows, layers, positions,
        width].
      difference: v, states under the preferred minus those under the dispreferred stimulus, for
        the same response.
      alpha: step along the difference; 5 in the paper's experiments.

    Returns:
      The target, of the same shape.

    References:
      Liu et al., 2024, arXiv:2312.15997 (RAHF); Zou et al., 2023, arXiv:2310.01405 (LORRA).
    """
    return base + alpha * difference


def hidden_state_matching(
    states: States, target: States, mask: Bool[Array, "rows positions"]
) -> Float[Array, " rows"]:
    r"""Squared distance between hidden states and their target, over a response's positions.

    .. math:: \ell = \frac{1}{|S|} \sum_{s \in S} \sum_t m_t \lVert h_{s,t} - h^*_{s,t} \rVert_2^2

    Args:
      states: hidden states h of the trained model at the layers S, [rows, layers, positions,
        width].
      target: h*, of the same shape; no gradient is stopped here.
      mask: m, true where a position holds a token of the response.

    Returns:
      One sum per row, [rows], not reduced; divide by the number of positions in all rows for
      the mean of a position. Where all states are on their target it is 0.

    Slopes:
      d loss / d h = 2 m (h - h*) / |S|

    References:
      Liu et al., 2024, arXiv:2312.15997, the loss in the paper.
    """
    return _over_positions(jnp.sum(jnp.square(states - target), axis=-1), mask)


def hidden_state_distance(
    states: States, target: States, mask: Bool[Array, "rows positions"]
) -> Float[Array, " rows"]:
    r"""Distance, not squared, between hidden states and their target.

    .. math:: \ell = \frac{1}{|S|} \sum_{s \in S} \sum_t m_t \lVert h_{s,t} - h^*_{s,t} \rVert_2

    Args:
      states: as for `hidden_state_matching`.
      target: as for `hidden_state_matching`.
      mask: as for `hidden_state_matching`.

    Returns:
      One sum per row, [rows], not reduced. On the target, where the norm has no gradient, the
      gradient is 0.

    Slopes:
      d loss / d h = m (h - h*) / (|S| norm of h - h*)

    References:
      Liu et al., 2024, arXiv:2312.15997, the loss in its released code.
    """
    squares = jnp.sum(jnp.square(states - target), axis=-1)
    off = squares > 0
    norms = jnp.where(off, jnp.sqrt(jnp.where(off, squares, 1.0)), 0.0)
    return _over_positions(norms, mask)


def _over_positions(
    values: Float[Array, "rows layers positions"], mask: Bool[Array, "rows positions"]
) -> Float[Array, " rows"]:
    """Mean over layers, sum over real positions; by `where`, as padding may be anything."""
    return jnp.sum(jnp.where(mask[:, None], values, 0.0), axis=(1, 2)) / values.shape[1]
