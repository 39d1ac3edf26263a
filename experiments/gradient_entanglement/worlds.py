r"""Small worlds of the theory: two log-probs of a few parameters, and their geometry by hand.

Each world is a pair of log-prob functions of one array of parameters, with the closed form of

.. math:: n_w = \|\nabla a\|^2, \quad n_l = \|\nabla b\|^2, \quad
          ip = \langle \nabla a, \nabla b \rangle

written out separately. With a softmax p and a token y at a position, :math:`\delta = e_y - p` is
the gradient of the token's log-prob by the logits. Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

LogProbs = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True, kw_only=True)
class World:
    """Parameters, the chosen and rejected log-prob of them, and what the closed form says."""

    parameters: np.ndarray
    log_probs: LogProbs
    closed: tuple[float, float, float]
    """n_w, n_l, ip."""


def residuals(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The gradients e_y - p of tokens' log-probs by their logits, [tokens, vocabulary]."""
    return np.eye(logits.shape[-1])[tokens] - softmax(logits, axis=-1)


def _log_prob(logits: jax.Array, tokens: np.ndarray) -> jax.Array:
    rows = jax.nn.log_softmax(logits)
    return rows[jnp.arange(len(tokens)), jnp.asarray(tokens)].sum()


def single_token(seed: int, *, vocabulary: int = 30, width: int = 8) -> World:
    """E1: one token, the last layer learns, one frozen hidden state for both responses."""
    rng = np.random.default_rng(seed)
    matrix, hidden = rng.normal(size=(vocabulary, width)), rng.normal(size=width)
    chosen, rejected = np.array([0]), np.array([1])
    p, square = softmax(matrix @ hidden), float(hidden @ hidden)
    norm = float(p @ p)
    return World(
        parameters=matrix,
        log_probs=lambda m: (
            _log_prob((m @ hidden)[None], chosen),
            _log_prob((m @ hidden)[None], rejected),
        ),
        closed=(
            square * (1 - 2 * p[0] + norm),
            square * (1 - 2 * p[1] + norm),
            square * (norm - p[0] - p[1]),
        ),
    )


def free_logits(seed: int, *, prefix: int, vocabulary: int = 10, length: int = 10) -> World:
    """E2: a free logit vector per context; the responses part after a shared prefix."""
    rng = np.random.default_rng(seed)
    suffix = length - prefix - 1
    logits = rng.normal(size=(prefix + 1 + 2 * suffix, vocabulary))
    shared = rng.integers(0, vocabulary, prefix)
    own = rng.integers(0, vocabulary, (2, suffix))
    chosen = np.concatenate([shared, [0], own[0]]).astype(int)
    rejected = np.concatenate([shared, [1], own[1]]).astype(int)
    first = np.arange(prefix + 1)
    of_chosen = np.concatenate([first, prefix + 1 + np.arange(suffix)])
    of_rejected = np.concatenate([first, prefix + 1 + suffix + np.arange(suffix)])
    w, r = residuals(logits[of_chosen], chosen), residuals(logits[of_rejected], rejected)
    p = softmax(logits[prefix])
    before = float((w[:prefix] ** 2).sum())
    norm = float(p @ p)
    return World(
        parameters=logits,
        log_probs=lambda z: (_log_prob(z[of_chosen], chosen), _log_prob(z[of_rejected], rejected)),
        closed=(
            before + (1 - 2 * p[0] + norm) + float((w[prefix + 1 :] ** 2).sum()),
            before + (1 - 2 * p[1] + norm) + float((r[prefix + 1 :] ** 2).sum()),
            before + (norm - p[0] - p[1]),
        ),
    )


def shared_logits(
    seed: int, *, boost_chosen: float, boost_rejected: float, vocabulary: int = 30
) -> World:
    """E3: one suffix token whose logits both contexts share, but for fixed boosts of the token."""
    rng = np.random.default_rng(seed)
    base = 0.3 * rng.normal(size=vocabulary)
    token = np.array([0])
    boosts = [boost * np.eye(vocabulary)[0] for boost in (boost_chosen, boost_rejected)]
    w, r = (residuals((base + boost)[None], token)[0] for boost in boosts)
    return World(
        parameters=base,
        log_probs=lambda z: (
            _log_prob((z + boosts[0])[None], token),
            _log_prob((z + boosts[1])[None], token),
        ),
        closed=(float(w @ w), float(r @ r), float(w @ r)),
    )


def last_layer(
    seed: int,
    *,
    suffix: int,
    likeness: float,
    steps: int,
    prefix: int = 0,
    extra_rejected: int = 0,
    vocabulary: int = 30,
    width: int = 512,
    rate: float = 0.5,
) -> World:
    """E4 and E5: the last layer learns, hidden states are frozen, an identical suffix follows.

    Args:
      seed: of all draws.
      suffix: tokens after the first, differing one.
      likeness: cosine of the hidden states of chosen and rejected in the suffix.
      steps: supervised steps on the chosen suffix beforehand, at learning rate `rate`.
      prefix: shared tokens before the differing one.
      extra_rejected: tokens that the rejected response has more, with states of their own.
      vocabulary: tokens.
      width: of the hidden states, which have length 1.
      rate: of the supervised steps.
    """
    rng = np.random.default_rng(seed)

    def units(*shape: int) -> np.ndarray:
        x = rng.normal(size=(*shape, width))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    before, at, u, v = units(prefix), units(1), units(suffix), units(suffix)
    v -= np.sum(u * v, axis=-1, keepdims=True) * u
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    other = likeness * u + np.sqrt(1 - likeness**2) * v
    shared, same = rng.integers(2, vocabulary, prefix), rng.integers(2, vocabulary, suffix)
    more = rng.integers(2, vocabulary, extra_rejected)
    chosen = np.concatenate([shared, [0], same]).astype(int)
    rejected = np.concatenate([shared, [1], same, more]).astype(int)
    h_w = np.concatenate([before, at, u])
    h_l = np.concatenate([before, at, other, units(extra_rejected)])
    matrix = 0.3 * rng.normal(size=(vocabulary, width))
    for _ in range(steps):
        matrix = matrix + rate * residuals(u @ matrix.T, same).T @ u
    w, r = residuals(h_w @ matrix.T, chosen), residuals(h_l @ matrix.T, rejected)

    def gram(x: np.ndarray, hx: np.ndarray, y: np.ndarray, hy: np.ndarray) -> float:
        return float(np.sum((x @ y.T) * (hx @ hy.T)))

    return World(
        parameters=matrix,
        log_probs=lambda m: (_log_prob(h_w @ m.T, chosen), _log_prob(h_l @ m.T, rejected)),
        closed=(gram(w, h_w, w, h_w), gram(r, h_l, r, h_l), gram(w, h_w, r, h_l)),
    )


def by_autodiff(world: World) -> tuple[float, float, float]:
    """n_w, n_l and ip from the gradients of the log-probs themselves."""
    with jax.enable_x64(True):
        rows = jax.jacrev(lambda m: jnp.stack(world.log_probs(m)))(jnp.asarray(world.parameters))
        w, r = np.asarray(rows).reshape(2, -1)
    return float(w @ w), float(r @ r), float(w @ r)


def one_step(
    world: World, weights: tuple[float, float] = (1.0, 1.0), *, size: float = 1e-5
) -> tuple[float, float]:
    """Realised changes of a and b by a gradient step size * (d_w g_w - d_l g_l), over its size."""
    with jax.enable_x64(True):
        start = jnp.asarray(world.parameters)
        rows = jax.jacrev(lambda m: jnp.stack(world.log_probs(m)))(start)
        end = start + size * (weights[0] * rows[0] - weights[1] * rows[1])
        before, after = (np.asarray(jnp.stack(world.log_probs(m))) for m in (start, end))
    chosen, rejected = (after - before) / size
    return float(chosen), float(rejected)


def predicted(world: World, weights: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """The same to first order, from the closed form."""
    n_w, n_l, ip = world.closed
    return weights[0] * n_w - weights[1] * ip, weights[0] * ip - weights[1] * n_l
