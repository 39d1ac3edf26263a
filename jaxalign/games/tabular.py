"""Tabular policies: language models of one token, for any loss of log-probs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.errors import UserError
from jaxalign.games.equilibrium import Policy
from jaxalign.games.preferences import Preferences
from jaxalign.losses import PairLogProbs, SampleLogProbs
from jaxalign.records import record

Logits = Float[Array, " actions"]
Rows = Int[Array, " rows"]


@record
class Game:
    """A preference game and its reference policy."""

    preferences: Float[Array, "actions actions"]
    """Probability that the row's action is preferred to the column's."""
    reference: Float[Array, " actions"]
    """Log-probabilities of the reference, in nats."""
    lengths: Int[Array, " actions"]
    """Length of each action in tokens, for losses that divide by it."""


Law = Callable[[Logits, Game], Float[Array, "actions actions"]]
"""Law of pairs: joint probabilities of the first (row) and second (column) action."""


def game(preferences: Preferences, reference: Policy, *, lengths: list[int] | None = None) -> Game:
    """A game on the device, in JAX's current precision.

    Args:
      preferences: P with P + P^T = 1, [actions, actions].
      reference: probabilities, all > 0, [actions].
      lengths: length of each action in tokens. Default: 1.

    Returns:
      The game.

    Raises:
      UserError: preferences or reference are invalid.
    """
    if not np.allclose(preferences + preferences.T, 1):
        raise UserError("preferences: P[i, j] + P[j, i] must be 1 for all actions")
    if not (np.all(reference > 0) and np.isclose(reference.sum(), 1)):
        raise UserError(f"reference = {reference}: must be > 0 and add up to 1")
    return Game(
        preferences=jnp.asarray(preferences),
        reference=jnp.log(jnp.asarray(reference)),
        lengths=jnp.asarray([1] * len(reference) if lengths is None else lengths),
    )


def pair_log_probs(logits: Logits, game: Game, first: Rows, second: Rows) -> PairLogProbs:
    """Log-probs of pairs of actions, with the first as `chosen` and the second as `rejected`."""
    log_policy = jax.nn.log_softmax(logits)
    return PairLogProbs(
        chosen=log_policy[first],
        rejected=log_policy[second],
        reference_chosen=game.reference[first],
        reference_rejected=game.reference[second],
        chosen_length=game.lengths[first],
        rejected_length=game.lengths[second],
    )


def sample_log_probs(logits: Logits, game: Game, actions: Rows) -> SampleLogProbs:
    """Log-probs of single actions as responses of one token."""
    return SampleLogProbs(
        log_prob=jax.nn.log_softmax(logits)[actions][:, None],
        reference=game.reference[actions][:, None],
        mask=jnp.ones((actions.shape[0], 1), bool),
    )


def log_mixture(
    logits: Logits, game: Game, *, beta: float = 0.0, temperature: float = 1.0
) -> Float[Array, " actions"]:
    r"""Log-probabilities of the geometric mixture of policy and reference.

    .. math:: \pi_\beta \propto \pi^{(1 - \beta) / T} (\pi^{ref})^{\beta / T}

    Args:
      logits: of the policy, [actions].
      game: for its reference.
      beta: weight of the reference, in [0, 1]. Default 0: the policy itself.
      temperature: T > 0 at which the mixture is sampled. Default 1.

    Returns:
      Log-probabilities, [actions], in nats.
    """
    mixed = (1 - beta) * jax.nn.log_softmax(logits) + beta * game.reference
    return jax.nn.log_softmax(mixed / temperature)


def self_play(*, first: float = 0.0, second: float | None = None, temperature: float = 1.0) -> Law:
    """Two independent actions of mixtures of policy and reference.

    Args:
      first: weight beta of the reference in the first action's mixture. Default 0: the policy.
      second: the same for the second action. Default: as in the first.
      temperature: of both. Default 1; losses use temperature 1, so another one is a mismatch.

    Returns:
      The law.
    """

    def law(logits: Logits, game: Game) -> Float[Array, "actions actions"]:
        betas = (first, first if second is None else second)
        one, other = (
            jnp.exp(log_mixture(logits, game, beta=beta, temperature=temperature)) for beta in betas
        )
        return one[:, None] * other[None, :]

    return law


def fixed(joint: Float[np.ndarray, "actions actions"]) -> Law:
    """Pairs from a data set: joint probabilities that do not depend on the policy.

    Args:
      joint: probabilities of ordered pairs, or counts in proportion to them, [actions, actions].

    Returns:
      The law.
    """
    return lambda logits, game: jnp.asarray(joint / joint.sum(), logits.dtype)
