"""Nash-MD and its relatives: bounds of the theory, fixed points, and what orbits."""

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.games import GAMES, divergence, equilibrium, mirror_descent
from jaxalign.games.mirror_descent import munos_steps

HARD = GAMES["rock_paper_scissors"]
SKEWED = np.array([0.6, 0.3, 0.1])


def divergences(target, iterates):
    return np.array([divergence(target, policy) for policy in iterates])


@pytest.mark.parametrize("name", GAMES)
def test_nash_md_keeps_its_bound_and_falls_as_its_square(name):
    preferences, tau = GAMES[name], 0.1
    reference = np.arange(len(preferences), 0, -1.0)
    reference /= reference.sum()
    target = equilibrium(preferences, reference, tau)
    iterates = mirror_descent(preferences, reference, tau, steps=1000, step_size=munos_steps(tau))
    found = divergences(target, iterates)
    steps = np.arange(1, 1001)
    assert np.all(found[1:] <= 8 / (tau**2 * (steps + 1)))
    each = (1 - munos_steps(tau)(5) * tau) * found[5] + 2 * munos_steps(tau)(5) ** 2
    assert found[6] <= each
    assert found[1000] < 1e-6  # far below the bound, as 1 / T^2
    assert found[1000] < found[100] / 40 + 1e-15


def test_nash_md_on_the_hard_game_at_a_small_temperature():
    target = equilibrium(HARD, SKEWED, 0.02)
    iterates = mirror_descent(HARD, SKEWED, 0.02, steps=10_000, step_size=munos_steps(0.02))
    found = divergences(target, iterates[[100, 1000, 10_000]])
    np.testing.assert_allclose(found, [0.83, 9e-3, 2e-6], rtol=0.05)


@pytest.mark.parametrize("name", ["skewed_cycle", "rock_paper_scissors", "dice"])
def test_a_constant_step_ends_where_ipo_md_does(name):
    preferences, tau, eta = GAMES[name], 0.1, 0.5
    last = mirror_descent(preferences, SKEWED, tau, steps=2000, step_size=eta)[-1]
    target = equilibrium(preferences, SKEWED, tau, beta=eta * tau)
    np.testing.assert_allclose(last, target, atol=1e-12)
    assert divergence(equilibrium(preferences, SKEWED, tau), last) > 1e-6


def test_a_first_step_of_weight_one_forgets_the_start():
    starts = (SKEWED, np.array([0.01, 0.01, 0.98]))
    one, other = (
        mirror_descent(HARD, SKEWED, 0.1, steps=3, step_size=munos_steps(0.1), start=start)
        for start in starts
    )
    np.testing.assert_allclose(one[1:], other[1:], atol=1e-15)


def test_extragradient_finds_the_equilibrium_where_the_others_orbit():
    target = equilibrium(HARD, SKEWED, 0.02)

    def last(opponent):
        iterates = mirror_descent(HARD, SKEWED, 0.02, steps=2000, step_size=2.0, opponent=opponent)
        return divergence(target, iterates[-1])

    assert last("half_step") < 1e-14
    assert last("policy") > 1
    assert last("mixture") > 1


def test_mirror_descent_against_the_policy_has_the_equilibrium_as_its_fixed_point():
    target = equilibrium(HARD, SKEWED, 0.1)
    for opponent in ("policy", "half_step"):
        iterates = mirror_descent(
            HARD, SKEWED, 0.1, steps=20, step_size=0.5, opponent=opponent, start=target
        )
        np.testing.assert_allclose(iterates, np.tile(target, (21, 1)), atol=1e-12)


def test_steps_beyond_one_over_tau_are_refused():
    with pytest.raises(UserError, match="step 0"):
        mirror_descent(HARD, SKEWED, 0.1, steps=1, step_size=10.5)
