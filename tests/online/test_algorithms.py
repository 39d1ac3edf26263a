"""Online algorithms through the language models' own objective, in a world with exact numbers.

Expectations over responses are taken exactly: every pair of responses is a row of the batch whose
weight is its probability under the draws.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from jaxalign.data import PairBatch
from jaxalign.games import divergence, equilibrium, mirror_descent, mixture
from jaxalign.online import ALGORITHMS, OnlineObjective, RolloutBatch
from jaxalign.online.step import update_step, with_history
from jaxalign.training.objectives import Policy
from jaxalign.training.step import gradients, initial_state
from tests.online.world import CONFIG, World
from tests.slow import slow

TAU, BETA = 0.2, 0.25


DATA = np.array([0.4, 0.1, 0.2, 0.3])


def exact_batch(world, algorithm, params, previous=None):
    """Every combination of responses, weighed with its probability under the algorithm's draws."""
    rows = world.rows()
    number = len(rows.response_length)
    policy, reference = world.policy(params), world.policy(world.params)
    weight = np.ones((1,))
    for draw in algorithm.draws:
        drawn_from = world.mixture(policy, reference, draw.reference)
        if draw.previous:
            drawn_from = world.policy(previous)
        if draw.from_data:
            drawn_from = DATA
        weight = np.outer(weight, drawn_from).reshape(-1)
    grid = np.indices((number,) * len(algorithm.draws)).reshape(len(algorithm.draws), -1).T
    reward = world.rewards(None, world.names)
    batch = RolloutBatch(
        responses=PairBatch(
            tokens=rows.tokens[grid],
            prompt_length=rows.prompt_length[grid],
            response_tokens=rows.response_tokens[grid],
            response_length=rows.response_length[grid],
            record_index=np.zeros(len(grid), np.int32),
            weight=weight.astype(np.float32),
        ),
        preference=world.win[grid[:, :, None], grid[:, None, :]].astype(np.float32),
        reward=reward[grid].astype(np.float32),
        baseline=np.full(grid.shape, reward.mean(), np.float32),
        sampled_log_prob=None,
    )
    return jax.tree.map(jnp.asarray, batch)


def objective_of(name, **options):
    algorithm = ALGORITHMS[name](**options)
    return OnlineObjective(policy=Policy(config=CONFIG), algorithm=algorithm)


def learned(world, name, *, steps, rate, **options):
    """Probabilities of the responses after exact updates."""
    objective = objective_of(name, **options)
    algorithm = objective.algorithm
    falling = optax.cosine_decay_schedule(rate, algorithm.iteration or steps)
    rule = optax.chain(
        optax.scale_by_rms(decay=0.99),
        optax.scale_by_learning_rate(lambda at: falling(at % (algorithm.iteration or steps))),
    )
    optimizer = with_history(algorithm, rule)
    state = initial_state(world.params, optimizer, seed=0)
    frozen = {"policy": None, "reference": world.params}
    step = jax.jit(
        functools.partial(update_step, objective=objective, optimizer=optimizer, micro_batches=1)
    )
    for _ in range(steps):
        previous = getattr(state.opt_state, "previous", None)
        state, _ = step(state, frozen, exact_batch(world, algorithm, state.params, previous))
    return world.policy(state.params)


@pytest.mark.parametrize(
    ("name", "most", "options"),
    [
        ("online_ipo", 2, {}),
        slow(("self_play_pg", 2, {})),
        slow(("ipo_md", 1, {"beta": BETA})),
        ("nash_md_pg", 1, {"beta": BETA}),
        ("ipo_md", 2, {"beta": BETA}),
    ],
)
def test_the_fixed_point_is_the_papers(optimised, name, most, options):
    world = World(most)
    reference, beta = world.policy(world.params), options.get("beta", 0.0)
    target = world.target(TAU, beta)
    if most == 1 or not beta:  # of several tokens the mixture is not that of sequences
        np.testing.assert_allclose(target, equilibrium(world.win, reference, TAU, beta=beta))
    assert divergence(target, reference) > 0.02
    found = learned(world, name, steps=400, rate=0.003, tau=TAU, **options)
    assert divergence(target, found) < 1e-3
    if (
        beta and most == 1
    ):  # the mixture is the equilibrium, at another temperature; the policy is not
        nash = equilibrium(world.win, reference, TAU / (1 - beta))
        assert divergence(nash, mixture(found, reference, beta)) < 1e-4
        assert divergence(nash, found) > 1e-3


def test_an_iteration_of_sppo_is_a_step_of_multiplicative_weights(optimised):
    """Twice the regression of log-ratios on win rates, solved apart from this code."""
    world, beta, length = World(1), 0.5, 200
    expected = world.policy(world.params)
    for _ in range(2):
        before, wins = expected, world.win @ expected

        def error(logits, before=before, wins=wins):
            return before @ (log_softmax(logits) - np.log(before) - (wins - 0.5) / beta) ** 2

        expected = softmax(minimize(error, np.log(before), tol=1e-12).x)
    found = learned(
        world, "sppo", steps=2 * length, rate=0.01, beta=beta, samples=2, iteration=length
    )
    assert divergence(expected, world.policy(world.params)) > 0.02
    assert divergence(expected, found) < 1e-4


def test_iterations_of_inpo_are_mirror_descent_to_the_equilibrium(optimised):
    """The closed form of `games`, which converges to the equilibrium at the frozen reference."""
    world, tau, eta, length = World(1), 0.2, 0.5, 250
    reference = world.policy(world.params)
    descent = {"opponent": "policy", "step_size": 1 / eta}
    exact = mirror_descent(world.win, reference, tau, steps=300, **descent)
    found = learned(world, "inpo", steps=2 * length, rate=0.01, tau=tau, eta=eta, iteration=length)
    assert divergence(exact[2], exact[1]) > 1e-3
    assert divergence(exact[2], found) < 1e-4
    assert divergence(equilibrium(world.win, reference, tau), exact[-1]) < 1e-6


def test_iterations_with_two_past_policies_are_those_of_the_closed_form(optimised):
    """The second and third iteration mix two policies; the first has one."""
    world, tau, eta, length = World(1), 0.2, 0.5, 250
    reference, ratio = world.policy(world.params), tau / eta
    policies = [reference]
    for _ in range(3):
        mean = np.mean([np.log(x) for x in policies[:2]], axis=0)
        mixed = ratio * np.log(reference) + (1 - ratio) * mean
        policies.insert(0, softmax(mixed + world.win @ policies[0] / eta))
    options = {"tau": tau, "eta": eta, "iteration": length, "past": 2}
    found = learned(world, "mnpo", steps=3 * length, rate=0.01, **options)
    alone = mirror_descent(
        world.win, reference, tau, steps=3, opponent="policy", step_size=1 / eta
    )[-1]
    assert divergence(policies[0], alone) > 5e-4
    assert divergence(policies[0], found) < 1e-4


def test_extragradient_steps_are_those_of_the_formula(optimised):
    """Both gradients are at the first point; the optimiser moves with the second alone."""
    world, rate = World(1), 0.05
    objective = objective_of("egpo", tau=TAU)
    rule = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(lambda at: rate / (1 + at)))
    optimizer = with_history(objective.algorithm, rule)
    state = initial_state(world.params, optimizer, seed=0)
    frozen = {"policy": None, "reference": world.params}
    step = jax.jit(
        functools.partial(update_step, objective=objective, optimizer=optimizer, micro_batches=1)
    )

    @jax.jit
    def slope(params, batch):
        return gradients(objective, params, frozen, batch, jax.random.key(0))[0]

    point, inner = world.params, rule.init(world.params)
    for _ in range(2):
        half, at = point, point
        for is_second in (False, True):
            batch = exact_batch(world, objective.algorithm, at)
            state, _ = step(state, frozen, batch)
            updates, after = rule.update(slope(point, batch), inner, point)
            half = optax.apply_updates(point, updates)
            for found, expected in zip(
                jax.tree.leaves(state.params), jax.tree.leaves(half), strict=True
            ):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
            at = half
            if is_second:
                point, inner = half, after


def test_extragradient_ends_at_the_equilibrium(optimised):
    world = World(1)
    target = world.target(TAU, 0.0)
    found = learned(world, "egpo", steps=600, rate=0.003, tau=TAU)
    assert divergence(target, found) < 1e-3


def test_spin_tilts_the_policy_to_the_data_and_stays_there(optimised):
    """Logits of a data set's odds over the policy's, divided by beta; at beta 1 it is the data."""
    world = World(1)
    for beta, length, steps in ((2.0, 250, 250), (1.0, 250, 500)):
        found = learned(world, "spin", steps=steps, rate=0.01, beta=beta, iteration=length)
        before = world.policy(world.params)
        expected = before * (DATA / before) ** (1 / beta)
        assert divergence(DATA, before) > 0.05
        assert divergence(expected / expected.sum(), found) < 1e-4


@pytest.mark.parametrize("name", ["online_dpo", slow("online_slic")])
def test_dpo_and_slic_do_not_find_the_equilibrium(optimised, name):
    world = World(1)
    target = equilibrium(world.win, world.policy(world.params), TAU)
    found = learned(world, name, steps=300, rate=0.01, beta=TAU)
    assert divergence(target, found) > 0.02


def gradient(world, params, name, **options):
    objective = objective_of(name, **options)
    frozen = {"policy": None, "reference": world.params}
    batch = exact_batch(world, objective.algorithm, params)
    compiled = jax.jit(
        lambda params: gradients(objective, params, frozen, batch, jax.random.key(0))
    )
    return compiled(params)[0]


def test_the_gradient_of_online_ipo_is_that_of_self_play():
    """Proposition 4.2 of arXiv:2403.08635: 4 / tau of it, for the squared loss."""
    world = World(2)
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), world.params
    )
    contrastive = gradient(world, moved, "online_ipo", tau=TAU)
    of_play = gradient(world, moved, "self_play_pg", tau=TAU)
    scale = float(optax.tree.norm(of_play))
    for one, other in zip(jax.tree.leaves(contrastive), jax.tree.leaves(of_play), strict=True):
        np.testing.assert_allclose(one * TAU / 4, other, atol=1e-5 * scale)


def test_more_samples_are_all_their_pairs():
    world = World(2)
    two = gradient(world, world.params, "online_ipo", tau=TAU)
    three = gradient(world, world.params, "online_ipo", tau=TAU, samples=3)
    for one, other in zip(jax.tree.leaves(two), jax.tree.leaves(three), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_policy_gradient_on_a_reward_is_the_gradient_of_its_objective():
    """Finite differences of the exact reward less divergence."""
    world, tau = World(2), 0.3
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), world.params
    )
    found = gradient(world, moved, "regularised_policy_gradient", tau=tau)
    direction = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size + 1), x.shape), world.params
    )
    reward, reference = world.rewards(None, world.names), world.policy(world.params)

    def value(step):
        policy = world.policy(jax.tree.map(lambda x, d: x + step * d, moved, direction))
        return policy @ reward - tau * divergence(policy, reference)

    along = (value(1e-3) - value(-1e-3)) / 2e-3
    assert -float(optax.tree.vdot(found, direction)) == pytest.approx(along, rel=0.01)
