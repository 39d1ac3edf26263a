"""Training of tabular policies with the losses of language models, exactly or from samples."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.games.tabular import (
    Game,
    Law,
    Logits,
    Rows,
    pair_log_probs,
    sample_log_probs,
    self_play,
)
from jaxalign.losses import (
    PreferenceLoss,
    egpo,
    nash_md_pg,
    regularised_policy_gradient,
    soft_label,
)

PairLoss = Callable[[Logits, Game, Rows, Rows, Float[Array, " rows"]], Float[Array, " rows"]]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The law of pairs of actions, and the loss of each pair."""

    law: Law
    loss: PairLoss
    """(logits, game, first, second, preference for the first) -> one loss per pair."""


def contrastive(loss: PreferenceLoss, law: Law | None = None, **options: float) -> Algorithm:
    """Any preference loss with soft labels (IPO, DPO, SLiC), on pairs of any law.

    With `ipo` and the default law this is online IPO, with `self_play(first=beta)` IPO-MD, with
    `fixed(joint)` offline IPO.

    Args:
      loss: a preference loss of single pairs.
      law: how pairs are drawn. Default: both from the policy.
      options: hyperparameters of the loss.

    Returns:
      The algorithm.
    """

    def of_pairs(logits, game, first, second, preference):
        return soft_label(loss, pair_log_probs(logits, game, first, second), preference, **options)

    return Algorithm(law=self_play() if law is None else law, loss=of_pairs)


def policy_gradient(*, tau: float, beta: float = 0.0) -> Algorithm:
    """Nash-MD-PG: actions of the policy against the mixture; self-play at beta = 0.

    Args:
      tau: weight of the divergence from the reference, >= 0.
      beta: weight of the reference in the opponent's mixture, in [0, 1].

    Returns:
      The algorithm.
    """

    def of_pairs(logits, game, first, second, preference):
        return nash_md_pg(sample_log_probs(logits, game, first), preference, tau=tau)

    return Algorithm(law=self_play(second=beta), loss=of_pairs)


def reward_gradient(rewards: Float[Array, " actions"], *, tau: float) -> Algorithm:
    """Regularised policy gradient on a reward; the second action only gives the baseline.

    Args:
      rewards: of each action, [actions].
      tau: weight of the divergence from the reference, >= 0.

    Returns:
      The algorithm.
    """

    def of_pairs(logits, game, first, second, preference):
        samples = sample_log_probs(logits, game, first)
        return regularised_policy_gradient(samples, rewards[first], rewards[second], tau=tau)

    return Algorithm(law=self_play(), loss=of_pairs)


def expected_loss(
    algorithm: Algorithm, logits: Logits, game: Game, *, through_sampling: bool = False
) -> Float[Array, ""]:
    """The loss averaged over all pairs with their exact probabilities.

    Args:
      algorithm: law and loss.
      logits: of the policy, [actions].
      game: preferences and reference.
      through_sampling: whether the gradient also flows through the probabilities of the pairs; no
        published method does this, and it has another solution.

    Returns:
      The expectation, a scalar.
    """
    first, second = (x.ravel() for x in jnp.indices(game.preferences.shape))
    joint = algorithm.law(logits, game).ravel()
    joint = joint if through_sampling else jax.lax.stop_gradient(joint)
    losses = algorithm.loss(logits, game, first, second, game.preferences[first, second])
    return jnp.sum(joint * losses)


def sampled_loss(
    algorithm: Algorithm,
    logits: Logits,
    game: Game,
    key: Array,
    *,
    pairs: int,
    hard_labels: bool = False,
) -> Float[Array, ""]:
    """The mean loss of drawn pairs.

    Args:
      algorithm: law and loss.
      logits: of the policy, [actions].
      game: preferences and reference.
      key: random key.
      pairs: number of pairs.
      hard_labels: whether labels are drawn, 0 or 1, instead of being probabilities.

    Returns:
      The mean, a scalar.
    """
    of_pairs, of_labels = jax.random.split(key)
    joint = jax.lax.stop_gradient(algorithm.law(logits, game))
    drawn = jax.random.categorical(of_pairs, jnp.log(joint).ravel(), shape=(pairs,))
    first, second = jnp.divmod(drawn, joint.shape[1])
    preference = game.preferences[first, second]
    if hard_labels:
        preference = jax.random.bernoulli(of_labels, preference).astype(preference.dtype)
    return jnp.mean(algorithm.loss(logits, game, first, second, preference))


def learn(
    algorithm: Algorithm,
    game: Game,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    every: int | None = None,
    start: Logits | None = None,
    key: Array | None = None,
    pairs: int = 64,
    hard_labels: bool = False,
    through_sampling: bool = False,
) -> Float[Array, "records actions"]:
    """Policies during training from the reference with an optimiser.

    Args:
      algorithm: law and loss.
      game: preferences and reference.
      optimizer: of the logits.
      steps: number of updates.
      every: updates between two records, a divisor of `steps`. Default: only first and last.
      start: first logits, [actions]. Default: the reference's log-probabilities.
      key: random key of minibatches. Default None: exact expectations.
      pairs: of each minibatch.
      hard_labels: see `sampled_loss`.
      through_sampling: see `expected_loss`.

    Returns:
      Probabilities, [1 + steps / every, actions].

    Raises:
      UserError: `every` does not divide `steps`.
    """
    every = steps if every is None else every
    if steps % every:
        raise UserError(f"every = {every}: must divide steps = {steps}")
    logits = game.reference if start is None else start

    def loss(logits: Logits, key: Array | None) -> Float[Array, ""]:
        if key is None:
            return expected_loss(algorithm, logits, game, through_sampling=through_sampling)
        return sampled_loss(algorithm, logits, game, key, pairs=pairs, hard_labels=hard_labels)

    def update(carry, key):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits, key), state, logits)
        return (logits + updates, state), None

    def until_record(carry, keys):
        carry, _ = jax.lax.scan(update, carry, keys, length=every)
        return carry, jax.nn.softmax(carry[0])

    keys = None
    if key is not None:
        keys = jax.random.split(key, steps).reshape(steps // every, every, *key.shape)
    carry = (logits, optimizer.init(logits))
    _, policies = jax.lax.scan(until_record, carry, keys, length=steps // every)
    return jnp.concatenate([jax.nn.softmax(logits)[None], policies])


def extragradient(
    game: Game, *, tau: float, rate: float, steps: int, every: int | None = None
) -> Float[Array, "records actions"]:
    r"""Policies of extragradient preference optimisation, by gradients of the loss `egpo`.

    .. math:: \theta_{t + 1/2} = \theta_t - r \nabla\ell(\theta_t; \pi_t), \quad
              \theta_{t + 1} = \theta_t - r \nabla\ell(\theta_t; \pi_{t + 1/2})

    Pairs of actions are uniform and exact. With n actions this is `mirror_descent` against
    "half_step" with the step size 4 r / (n tau).

    Args:
      game: preferences and reference.
      tau: weight of the divergence from the reference, > 0.
      rate: r, of both steps.
      steps: number of pairs of steps.
      every: steps between two records, a divisor of `steps`. Default: only first and last.

    Returns:
      Probabilities, [1 + steps / every, actions], from the reference on.

    Raises:
      UserError: `every` does not divide `steps`.

    References:
      Zhou et al., 2025, arXiv:2503.08942.
    """
    every = steps if every is None else every
    if steps % every:
        raise UserError(f"every = {every}: must divide steps = {steps}")
    first, second = (x.ravel() for x in jnp.indices(game.preferences.shape))

    def loss(logits: Logits, opponent: Logits) -> Float[Array, ""]:
        wins = game.preferences @ jax.nn.softmax(opponent)
        pairs = pair_log_probs(logits, game, first, second)
        return jnp.mean(egpo(pairs, wins[first], wins[second], tau=tau))

    def step(logits: Logits, _: None) -> tuple[Logits, None]:
        half = logits - rate * jax.grad(loss)(logits, logits)
        return logits - rate * jax.grad(loss)(logits, half), None

    def until_record(logits: Logits, _: None) -> tuple[Logits, Float[Array, " actions"]]:
        logits, _ = jax.lax.scan(step, logits, length=every)
        return logits, jax.nn.softmax(logits)

    _, policies = jax.lax.scan(until_record, game.reference, length=steps // every)
    return jnp.concatenate([jax.nn.softmax(game.reference)[None], policies])
