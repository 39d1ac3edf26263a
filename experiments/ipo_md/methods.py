"""Worlds of three actions, the methods that learn in them, and the policies they should find."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize
from scipy.special import log_expit, softmax

from jaxalign.games import (
    GAMES,
    Algorithm,
    best_response,
    contrastive,
    equilibrium,
    fixed,
    game,
    learn,
    policy_gradient,
    reward_gradient,
    self_play,
)
from jaxalign.losses import dpo, ipo, ipo_mean, slic_norm

SKEWED, UNIFORM = np.array([0.6, 0.3, 0.1]), np.ones(3) / 3
BETA = 0.125  # of IPO-MD and Nash-MD-PG in the paper
RATE = 0.8  # of policy gradients; IPO's gradient is 4 / tau times as long
STEPS = 20_000
LENGTHS = [1, 3, 10]  # tokens that the actions count as, for the averaged loss
BATCH, SAMPLED_STEPS, SEEDS = 64, 6000, 10
Policy = np.ndarray


@dataclass(frozen=True, kw_only=True)
class World:
    """A game, its reference and temperature."""

    name: str
    preferences: np.ndarray
    reference: Policy
    tau: float

    @property
    def nash(self) -> Policy:
        return equilibrium(self.preferences, self.reference, self.tau)

    @property
    def rewards(self) -> np.ndarray:
        return fitted_rewards(self.preferences)


@dataclass(frozen=True, kw_only=True)
class Method:
    """An algorithm with its step size, and the policy that theory gives it, where it does."""

    algorithm: Callable[[World], Algorithm]
    rate: Callable[[float], float] = lambda tau: RATE * tau / 4
    target: Callable[[World], Policy] | None = None
    says: str = "nothing known"
    through_sampling: bool = False


HARD = World(
    name="rock, paper, scissors",
    preferences=GAMES["rock_paper_scissors"],
    reference=SKEWED,
    tau=0.05,
)

WORLDS = (
    World(name="skewed cycle", preferences=GAMES["skewed_cycle"], reference=SKEWED, tau=0.1),
    replace(HARD, tau=0.1),
    World(name="Bradley-Terry", preferences=GAMES["bradley_terry"], reference=SKEWED, tau=1.0),
)


def fitted_rewards(preferences: np.ndarray) -> np.ndarray:
    """Rewards of a Bradley-Terry model fitted to all pairs alike; the last action has 0."""

    def likelihood(free):
        rewards = np.append(free, 0.0)
        return -np.sum(preferences * log_expit(rewards[:, None] - rewards))

    return np.append(minimize(likelihood, np.zeros(len(preferences) - 1), tol=1e-14).x, 0.0)


def offline(world: World) -> Algorithm:
    """IPO on pairs of the reference's own responses."""
    return contrastive(ipo, fixed(np.outer(world.reference, world.reference)), tau=world.tau)


METHODS: dict[str, Method] = {
    "online IPO": Method(
        algorithm=lambda world: contrastive(ipo, tau=world.tau),
        target=lambda world: world.nash,
        says="the equilibrium",
    ),
    "self-play policy gradient": Method(
        algorithm=lambda world: policy_gradient(tau=world.tau),
        rate=lambda tau: RATE,
        target=lambda world: world.nash,
        says="the equilibrium",
    ),
    "IPO-MD, β = 1/8": Method(
        algorithm=lambda world: contrastive(ipo, self_play(first=BETA), tau=world.tau),
        target=lambda world: equilibrium(world.preferences, world.reference, world.tau, beta=BETA),
        says="π*_β",
    ),
    "Nash-MD-PG, β = 1/8": Method(
        algorithm=lambda world: policy_gradient(tau=world.tau, beta=BETA),
        rate=lambda tau: RATE,
        target=lambda world: equilibrium(world.preferences, world.reference, world.tau, beta=BETA),
        says="π*_β",
    ),
    "offline IPO": Method(
        algorithm=offline,
        target=lambda world: best_response(
            world.preferences, world.reference, world.reference, world.tau
        ),
        says="best response to the data",
    ),
    "online DPO": Method(
        algorithm=lambda world: contrastive(dpo, beta=world.tau), rate=lambda tau: 0.2 / tau
    ),
    "online SLiC": Method(
        algorithm=lambda world: contrastive(slic_norm, beta=world.tau), rate=lambda tau: 0.02 / tau
    ),
    "policy gradient on a fitted reward": Method(
        algorithm=lambda world: reward_gradient(jnp.asarray(world.rewards), tau=world.tau),
        rate=lambda tau: RATE,
        target=lambda world: softmax(np.log(world.reference) + world.rewards / world.tau),
        says="π_ref exp(r / τ)",
    ),
    "mistake: gradient through the sampling": Method(
        algorithm=lambda world: contrastive(ipo, tau=world.tau), through_sampling=True
    ),
    "mistake: sampled at temperature 0.7": Method(
        algorithm=lambda world: contrastive(ipo, self_play(temperature=0.7), tau=world.tau)
    ),
    "mistake: log-probs averaged over 1, 3, 10 tokens": Method(
        algorithm=lambda world: contrastive(ipo_mean, tau=world.tau),
        rate=lambda tau: 2 * RATE * tau,  # the averages' slopes are shorter
    ),
}


def run(
    method: Method, world: World, *, steps: int | None = None, every: int | None = None
) -> np.ndarray:
    """Policies on the way with exact expectations and plain gradient descent (`STEPS` of it)."""
    policies = learn(
        method.algorithm(world),
        game(world.preferences, world.reference, lengths=LENGTHS),
        optax.sgd(method.rate(world.tau)),
        steps=STEPS if steps is None else steps,
        every=every,
        through_sampling=method.through_sampling,
    )
    return np.asarray(policies)


def sampled(
    method: Method, world: World, *, hard_labels: bool, every: int | None = None
) -> np.ndarray:
    """Policies from minibatches of pairs, the rate brought down to 0, [seeds, records, actions]."""
    rates = optax.linear_schedule(method.rate(world.tau), 0.0, SAMPLED_STEPS)
    algorithm, drawn = method.algorithm(world), game(world.preferences, world.reference)

    def one(key):
        return learn(
            algorithm,
            drawn,
            optax.sgd(rates),
            steps=SAMPLED_STEPS,
            every=every,
            key=key,
            pairs=BATCH,
            hard_labels=hard_labels,
        )

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS)))


def with_adam(world: World, rate: float, b1: float, *, every: int | None = None) -> np.ndarray:
    """Online IPO under Adam, 20,000 exact gradients."""
    policies = learn(
        contrastive(ipo, tau=world.tau),
        game(world.preferences, world.reference),
        optax.adam(rate, b1=b1),
        steps=20_000,
        every=every,
    )
    return np.asarray(policies)
