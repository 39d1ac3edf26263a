"""Who learns what: gradients in closed form, fixed points, and the methods that must miss them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import root
from scipy.special import softmax

from jaxalign.errors import UserError
from jaxalign.games import (
    GAMES,
    Algorithm,
    best_response,
    contrastive,
    divergence,
    equilibrium,
    expected_loss,
    extragradient,
    fixed,
    game,
    learn,
    mirror_descent,
    mixture,
    pair_log_probs,
    policy_gradient,
    random_preferences,
    reward_gradient,
    sample_log_probs,
    sampled_loss,
    self_play,
)
from jaxalign.losses import PairLogProbs, dpo, ipo, ipo_mean, mnpo, nash_md_pg, slic_norm

UNIFORM = np.ones(3) / 3
SKEWED = np.array([0.6, 0.3, 0.1])
FOUR = np.array([0.4, 0.3, 0.2, 0.1])
CYCLE, HARD = GAMES["skewed_cycle"], GAMES["rock_paper_scissors"]
TAU = 0.1
RATE = 0.8  # of a policy gradient; IPO's gradient is 4 / tau times as long


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def last(algorithm, world, rate, *, steps=1000, **options):
    return np.asarray(learn(algorithm, world, optax.sgd(rate), steps=steps, **options)[-1])


def ipo_rate(tau):
    return RATE * tau / 4


# Gradients.


def implementation_form(pairs, *, tau):
    """Minus the gap of log-probs plus tau h^2: IPO as implemented, tau times the square."""
    return pairs.rejected - pairs.chosen + tau * pairs.margin**2


@pytest.fixture
def drawn(rng):
    """A random game of five actions, its reference, and logits of a policy."""
    return random_preferences(rng, 5), rng.dirichlet(np.ones(5)), rng.normal(size=5)


def slope(algorithm, preferences, reference, logits):
    def loss(logits):
        return expected_loss(algorithm, logits, game(preferences, reference))

    return np.asarray(jax.grad(loss)(jnp.asarray(logits)))


def ascent(preferences, reference, logits, *, beta, law, centred=False):
    """E_law[(e_y - pi) (P(y > m) - 1/2 - tau (l - centre))]: the published gradients."""
    policy = softmax(logits)
    m = mixture(policy, reference, beta)
    law = m if law == "mixture" else policy
    ratio = np.log(policy / reference)
    ratio = ratio - (m @ ratio if centred else 0)
    weight = law * (preferences @ m - 0.5 - TAU * ratio)
    return weight - weight.sum() * policy


def test_online_ipo_is_self_play_times_4_over_tau(drawn):
    expected = ascent(*drawn, beta=0.0, law="policy")
    square = slope(contrastive(ipo, tau=TAU), *drawn)
    np.testing.assert_allclose(square, -4 / TAU * expected, rtol=1e-10)
    published = slope(contrastive(implementation_form, tau=TAU), *drawn)
    np.testing.assert_allclose(published, -4 * expected, rtol=1e-10)
    np.testing.assert_allclose(slope(policy_gradient(tau=TAU), *drawn), -expected, rtol=1e-10)


@pytest.mark.parametrize("beta", [0.125, 0.5, 1.0])
def test_gradients_with_a_mixture(beta, drawn):
    found = slope(policy_gradient(tau=TAU, beta=beta), *drawn)
    np.testing.assert_allclose(found, -ascent(*drawn, beta=beta, law="policy"), rtol=1e-10)
    found = slope(contrastive(ipo, self_play(first=beta), tau=TAU), *drawn)
    centred = ascent(*drawn, beta=beta, law="mixture", centred=True)
    np.testing.assert_allclose(found, -4 / TAU * centred, rtol=1e-10)
    relayed = ascent(*drawn, beta=beta, law="mixture")  # without E_m[l]: another direction
    across = found - (found @ relayed) / (relayed @ relayed) * relayed
    assert np.linalg.norm(across) > 1e-4 * np.linalg.norm(found)


def test_the_uncentred_gradient_of_ipo_md_ends_elsewhere():
    """What prop. 5.1 is relayed to say, taken at its word, does not lead to pi*_beta."""

    def field(free):
        found = ascent(CYCLE, SKEWED, np.append(free, 0.0), beta=0.125, law="mixture")
        return found[:2]

    target = equilibrium(CYCLE, SKEWED, TAU, beta=0.125)
    start = np.log(target[:2] / target[2])
    found = softmax(np.append(root(field, start, tol=1e-14).x, 0.0))
    np.testing.assert_allclose(found, [0.5936, 0.0746, 0.3317], atol=1e-4)
    np.testing.assert_allclose(divergence(target, found), 1.1e-4, rtol=0.05)


def test_self_play_is_the_gradient_of_its_objective(drawn):
    preferences, reference, logits = drawn
    opponent = softmax(logits)

    def objective(logits):
        log_policy = jax.nn.log_softmax(logits)
        score = jnp.asarray(preferences @ opponent + TAU * np.log(reference)) - TAU * log_policy
        return jnp.exp(log_policy) @ score

    expected = -jax.grad(objective)(jnp.asarray(logits))
    np.testing.assert_allclose(slope(policy_gradient(tau=TAU), *drawn), expected, rtol=1e-10)


def test_a_reward_gradient_is_that_of_its_objective(drawn):
    preferences, reference, logits = drawn
    rewards = jnp.asarray(preferences[0])

    def objective(logits):
        log_policy = jax.nn.log_softmax(logits)
        return jnp.exp(log_policy) @ (rewards - TAU * (log_policy - jnp.log(reference)))

    expected = -jax.grad(objective)(jnp.asarray(logits))
    found = slope(reward_gradient(rewards, tau=TAU), *drawn)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_minibatches_estimate_the_expectation(drawn):
    preferences, reference, logits = drawn
    world, logits = game(preferences, reference), jnp.asarray(logits)
    keys = jax.random.split(jax.random.key(0), 2000)
    for algorithm in (
        contrastive(dpo, self_play(first=0.3, second=0.6), beta=TAU),
        policy_gradient(tau=TAU, beta=0.3),
    ):
        for hard in (False, True):

            def estimate(key, algorithm=algorithm, hard=hard):
                return jax.grad(sampled_loss, argnums=1)(
                    algorithm, logits, world, key, pairs=4, hard_labels=hard
                )

            found = np.asarray(jax.vmap(estimate)(keys))
            error = found.std(axis=0) / np.sqrt(len(keys))
            expected = slope(algorithm, *drawn)
            assert np.all(np.abs(found.mean(axis=0) - expected) < 4.5 * error)


@pytest.mark.parametrize(
    ("at", "expected"), [("reference", (0.0341, 0.0263)), ("equilibrium", (0.0257, 0.0141))]
)
def test_both_responses_estimate_self_play_with_less_variance_than_one(at, expected):
    """Traces of the covariances of single pairs' gradients; the contrastive one is ours."""
    policy = SKEWED if at == "reference" else equilibrium(CYCLE, SKEWED, TAU)
    world, logits = game(CYCLE, SKEWED), jnp.log(jnp.asarray(policy))
    first, second = (x.ravel() for x in jnp.indices((3, 3)))
    preference = jnp.asarray(CYCLE.ravel())
    weight = np.outer(policy, policy).ravel()

    def spread(rows):
        mean = weight @ rows
        return float(weight @ np.sum((rows - mean) ** 2, axis=-1))

    def both(logits):
        return contrastive(ipo, tau=TAU).loss(logits, world, first, second, preference)

    def one(logits):
        return nash_md_pg(sample_log_probs(logits, world, first), preference, tau=TAU)

    found = np.asarray(jax.jacrev(both)(logits)) * TAU / 4
    np.testing.assert_allclose(spread(found), expected[1], atol=1e-4)
    ratio = np.log(policy / SKEWED)
    f = CYCLE - 0.5 - TAU * (ratio[:, None] - ratio[None, :])  # of h, on the first response alone
    alone = f.ravel()[:, None] * (np.eye(3) - policy)[np.asarray(first)]
    np.testing.assert_allclose(spread(alone), expected[0], atol=1e-4)
    if at == "equilibrium":  # the ordinary policy gradient
        np.testing.assert_allclose(spread(np.asarray(jax.jacrev(one)(logits))), 0.0231, atol=1e-4)


# Exact learning.

WORLDS = [(CYCLE, SKEWED), (CYCLE, UNIFORM), (HARD, SKEWED), (GAMES["dice"], SKEWED)]


def of_all(algorithm, rate, steps, worlds=WORLDS):
    """Last policies in several games of as many actions, learnt in one program."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(game(*world) for world in worlds))
    optimizer = optax.sgd(rate)
    run = jax.vmap(lambda world: learn(algorithm, world, optimizer, steps=steps)[-1])
    return np.asarray(run(stacked))


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5])
def test_ipo_on_mixtures_finds_its_target_and_its_mixture_the_equilibrium(beta):
    found = of_all(contrastive(ipo, self_play(first=beta), tau=TAU), ipo_rate(TAU), 1500)
    for policy, (preferences, reference) in zip(found, WORLDS, strict=True):
        target = equilibrium(preferences, reference, TAU, beta=beta)
        np.testing.assert_allclose(policy, target, atol=1e-6)
        tighter = equilibrium(preferences, reference, TAU / (1 - beta))
        np.testing.assert_allclose(mixture(policy, reference, beta), tighter, atol=1e-6)
        if beta:
            assert divergence(equilibrium(preferences, reference, TAU), policy) > 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_nash_md_policy_gradient_finds_the_same_targets(beta):
    found = of_all(policy_gradient(tau=TAU, beta=beta), RATE, 3000)
    for policy, world in zip(found, WORLDS, strict=True):
        np.testing.assert_allclose(policy, equilibrium(*world, TAU, beta=beta), atol=1e-6)


def test_four_actions():
    preferences = GAMES["skewed_cycle_and_one"]
    world, target = game(preferences, FOUR), equilibrium(preferences, FOUR, TAU)
    found = last(contrastive(ipo, tau=TAU), world, ipo_rate(TAU), steps=5000)
    np.testing.assert_allclose(found, target, atol=1e-6)


def test_a_reward_is_learnt_in_closed_form():
    rewards = np.array([1.0, 0.0, -0.5])
    found = last(
        reward_gradient(jnp.asarray(rewards), tau=1.0), game(CYCLE, SKEWED), RATE, steps=500
    )
    np.testing.assert_allclose(found, softmax(np.log(SKEWED) + rewards), atol=1e-6)


# Methods that find something else, and mistakes.


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ((0.6, 0.3, 0.1), (0.365639, 0.247834, 0.386527)),
        ((0.1, 0.3, 0.6), (0.276491, 0.431222, 0.292287)),
    ],
)
def test_offline_ipo_answers_its_data_and_not_the_game(behaviour, expected):
    behaviour, dice = np.array(behaviour), GAMES["dice"]
    offline = contrastive(ipo, fixed(np.outer(behaviour, behaviour)), tau=TAU)
    found = last(offline, game(dice, UNIFORM), ipo_rate(TAU), steps=2000)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found, best_response(dice, behaviour, UNIFORM, TAU), atol=1e-6)
    assert divergence(equilibrium(dice, UNIFORM, TAU), found) > 1e-3


@pytest.mark.parametrize(
    ("name", "reference", "tau", "expected"),
    [
        ("skewed_cycle", UNIFORM, 0.1, (0.352431, 0.216637, 0.430932)),
        ("skewed_cycle", SKEWED, 1.0, (0.706900, 0.118816, 0.174285)),
        ("bradley_terry", SKEWED, 1.0, (0.818915, 0.150631, 0.030454)),
        ("two_actions", np.ones(2) / 2, 1.0, (0.7, 0.3)),
    ],
)
def test_online_dpo_finds_something_else(name, reference, tau, expected):
    preferences = GAMES[name]
    algorithm = contrastive(dpo, beta=tau)
    found = last(algorithm, game(preferences, reference), 0.2 / tau, steps=5000)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert divergence(equilibrium(preferences, reference, tau), found) > 4e-3
    if name == "bradley_terry":  # the optimum of reinforcement learning
        optimum = softmax(np.log(reference) + np.array([1.0, 0.0, -0.5]) / tau)
        np.testing.assert_allclose(found, optimum, atol=1e-6)


def test_online_slic_stops_at_its_hinge_whatever_the_preference():
    for probability in (0.6, 0.7, 0.9):
        preferences = np.array([[0.5, probability], [1 - probability, 0.5]])
        world = game(preferences, np.ones(2) / 2)
        found = last(contrastive(slic_norm, beta=1.0), world, 0.01, steps=2500)
        np.testing.assert_allclose(found, [0.731, 0.269], atol=2e-3)  # sigma(1 / tau)


def test_gradient_through_the_sampling_leads_elsewhere():
    found = last(
        contrastive(ipo, tau=TAU),
        game(CYCLE, SKEWED),
        ipo_rate(TAU),
        steps=2000,
        through_sampling=True,
    )
    assert divergence(equilibrium(CYCLE, SKEWED, TAU), found) > 0.1


@pytest.mark.parametrize(("temperature", "distance"), [(0.9, 9e-4), (0.7, 9e-3)])
def test_another_temperature_in_sampling_than_in_scoring_moves_the_fixed_point(
    temperature, distance
):
    algorithm = contrastive(ipo, self_play(temperature=temperature), tau=TAU)
    found = last(algorithm, game(CYCLE, SKEWED), ipo_rate(TAU), steps=2000)
    off = divergence(equilibrium(CYCLE, SKEWED, TAU), found)
    np.testing.assert_allclose(off, distance, rtol=0.05)


def test_only_summed_log_probs_have_the_equilibrium_where_lengths_differ():
    world, target = game(CYCLE, SKEWED, lengths=[1, 3, 10]), equilibrium(CYCLE, SKEWED, TAU)
    summed = last(contrastive(ipo, tau=TAU), world, ipo_rate(TAU), steps=1500)
    np.testing.assert_allclose(summed, target, atol=1e-6)
    averaged = last(contrastive(ipo_mean, tau=TAU), world, ipo_rate(TAU), steps=15_000)
    np.testing.assert_allclose(divergence(target, averaged), 0.096, atol=1e-3)


def test_momentum_orbits_on_the_hard_game():
    """Adam with its usual first moment against Adam without, 20,000 exact gradients each."""
    world, target = game(HARD, SKEWED), equilibrium(HARD, SKEWED, 0.05)
    algorithm = contrastive(ipo, tau=0.05)

    def off(b1):
        policies = learn(algorithm, world, optax.adam(0.01, b1=b1), steps=20_000)
        return divergence(target, np.asarray(policies[-1]))

    assert off(0.9) > 0.05
    assert off(0.0) < 1e-3


# Learning from samples.


def samples_end_close(algorithm, rate, steps, **options):
    """Five seeds, the rate brought down to 0; divergences from the equilibrium."""
    world, target = game(CYCLE, SKEWED), equilibrium(CYCLE, SKEWED, TAU)
    optimizer = optax.sgd(optax.linear_schedule(rate, 0.0, steps))

    def run(key):
        return learn(algorithm, world, optimizer, steps=steps, key=key, **options)[-1]

    policies = jax.vmap(run)(jax.random.split(jax.random.key(0), 5))
    return [divergence(target, policy) for policy in np.asarray(policies)]


def test_online_ipo_from_soft_labels():
    assert max(samples_end_close(contrastive(ipo, tau=TAU), ipo_rate(TAU), 2000)) < 3e-3


@pytest.mark.slow
def test_online_ipo_from_hard_labels_and_nash_md_policy_gradient():
    online = contrastive(ipo, tau=TAU)
    assert max(samples_end_close(online, ipo_rate(TAU), 6000, hard_labels=True)) < 3e-3
    assert max(samples_end_close(policy_gradient(tau=TAU), RATE, 6000)) < 3e-3


def test_records_on_the_way_are_those_of_shorter_runs():
    world, algorithm = game(CYCLE, SKEWED), contrastive(ipo, tau=TAU)
    way = learn(algorithm, world, optax.sgd(0.01), steps=30, every=10)
    assert way.shape == (4, 3)
    np.testing.assert_allclose(way[0], SKEWED)
    np.testing.assert_allclose(way[1], last(algorithm, world, 0.01, steps=10), atol=1e-12)
    with pytest.raises(UserError, match="divide"):
        learn(algorithm, world, optax.sgd(0.01), steps=30, every=7)


def test_a_game_is_checked():
    with pytest.raises(UserError, match="must be 1"):
        game(np.ones((3, 3)), UNIFORM)
    with pytest.raises(UserError, match="add up to 1"):
        game(CYCLE, np.array([0.5, 0.5, 0.5]))


def test_a_law_of_a_data_set_draws_only_its_pairs():
    joint = np.zeros((3, 3))
    joint[0, 1] = joint[2, 1] = 1.0
    algorithm = contrastive(ipo, fixed(joint), tau=TAU)
    world, logits = game(CYCLE, SKEWED), jnp.asarray([0.3, -0.2, 0.1])
    first, second = jnp.array([0, 2]), jnp.array([1, 1])
    ends = algorithm.loss(logits, world, first, second, jnp.asarray(CYCLE[[0, 2], [1, 1]]))
    np.testing.assert_allclose(expected_loss(algorithm, logits, world), ends.mean())
    keys = jax.random.split(jax.random.key(1), 50)
    seen = jax.vmap(lambda key: sampled_loss(algorithm, logits, world, key, pairs=1))(keys)
    assert set(np.round(np.asarray(seen), 9)) == set(np.round(np.asarray(ends), 9))


def test_soft_labels_are_those_of_the_game():
    world, logits = game(CYCLE, SKEWED), jnp.asarray([0.3, -0.2, 0.1])
    algorithm = contrastive(slic_norm, beta=0.5)
    assert algorithm.law(logits, world).shape == (3, 3)
    total = expected_loss(algorithm, logits, world)
    weight = np.asarray(algorithm.law(logits, world))
    hinge = 0.0
    ratio = np.asarray(jax.nn.log_softmax(logits)) - np.log(SKEWED)
    for i in range(3):
        for j in range(3):
            h = 0.5 * (ratio[i] - ratio[j])
            each = CYCLE[i, j] * max(0, 1 - h) + CYCLE[j, i] * max(0, 1 + h)
            hinge += weight[i, j] * each
    np.testing.assert_allclose(total, hinge, rtol=1e-12)


# Extragradient.


def test_extragradient_by_its_loss_is_the_closed_form_and_converges_linearly():
    """The loss's gradient in the logits is that of mirror descent; the last iterate converges."""
    tau, rate = 0.1, 0.02
    policies = np.asarray(extragradient(game(HARD, SKEWED), tau=tau, rate=rate, steps=400, every=1))
    size = 4 * rate / (3 * tau)  # eta: a step moves logits by eta times win rates
    exact = mirror_descent(HARD, SKEWED, tau, steps=400, step_size=size, opponent="half_step")
    np.testing.assert_allclose(policies, exact, atol=1e-9)
    target = equilibrium(HARD, SKEWED, tau)
    errors = [divergence(target, policies[at]) for at in (100, 200, 300, 400)]
    assert errors[-1] < 1e-6
    ratios = np.divide(errors[1:], errors[:-1])
    assert ratios.max() < 0.2
    with pytest.raises(UserError, match="every = 3"):
        extragradient(game(HARD, SKEWED), tau=tau, rate=rate, steps=400, every=3)


# Several past policies.


def with_past_policies(preferences, reference, policies, tau, eta):
    """The next policy in closed form: mirror descent from the mean of the past log-policies."""
    mean = np.mean([np.log(x) for x in policies], axis=0)
    ratio = tau / eta
    logits = ratio * np.log(reference) + (1 - ratio) * mean + preferences @ policies[0] / eta
    return softmax(logits)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_past_policies_by_their_loss_are_the_closed_form_and_lead_to_the_equilibrium(number):
    tau, eta = 0.2, 0.6
    policies = [SKEWED]  # the newest first
    for _ in range(3):
        past = jnp.log(jnp.asarray(np.stack(policies[:number])))

        def of_pairs(logits, game, first, second, preference, past=past):
            def loss(pairs, *, sign):
                margins = sign * (past[:, first] - past[:, second])
                return mnpo(pairs, margins, tau=tau, eta=eta)

            pairs = pair_log_probs(logits, game, first, second)
            agree, other = loss(pairs, sign=1), loss(pairs.swapped, sign=-1)
            return preference * agree + (1 - preference) * other

        law = fixed(np.outer(policies[0], policies[0]))
        algorithm = Algorithm(law=law, loss=of_pairs)
        found = last(algorithm, game(CYCLE, SKEWED), 0.3, steps=4000, start=jnp.log(policies[0]))
        expected = with_past_policies(CYCLE, SKEWED, policies[:number], tau, eta)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        policies.insert(0, expected)
    for _ in range(400):
        policies.insert(0, with_past_policies(CYCLE, SKEWED, policies[:number], tau, eta))
    np.testing.assert_allclose(policies[0], equilibrium(CYCLE, SKEWED, tau), atol=1e-6)


def test_one_past_policy_is_inpo(rng):
    """IPO with the geometric mixture of reference and the policy that sampled."""
    fields = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    values = {name: jnp.asarray(rng.normal(size=5)) for name in fields}
    lengths = dict.fromkeys(("chosen_length", "rejected_length"), jnp.ones(5, jnp.int32))
    pairs = PairLogProbs(**values, **lengths)
    past = jnp.asarray(rng.normal(size=(1, 5)))
    mixed = dataclasses.replace(
        pairs,
        reference_chosen=pairs.reference_chosen / 3 + 2 / 3 * past[0],
        reference_rejected=pairs.reference_rejected / 3,
    )
    found = mnpo(pairs, past, tau=0.2, eta=0.6)
    np.testing.assert_allclose(found, ipo(mixed, tau=0.6), rtol=1e-12)
