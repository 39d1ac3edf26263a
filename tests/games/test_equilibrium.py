"""Equilibria against reference values, certificates, and what they are to each other."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from jaxalign.errors import UserError
from jaxalign.games import (
    GAMES,
    antisymmetric,
    best_response,
    bradley_terry,
    cycle,
    divergence,
    duality_gap,
    equilibrium,
    mixture,
    random_preferences,
)

REFERENCES = {
    "u": np.ones(3) / 3,
    "s3": np.array([0.6, 0.3, 0.1]),
    "s4": np.array([0.4, 0.3, 0.2, 0.1]),
    "u2": np.ones(2) / 2,
}

# Computed apart from this code, by damped iteration: game, reference, tau, equilibrium.
EQUILIBRIA = """
dice                 s3 1    .606466 .291753 .101781
dice                 s3 .1   .643730 .228498 .127772
dice                 s3 .05  .639273 .187467 .173260
skewed_cycle         u  1    .355246 .319198 .325556
skewed_cycle         u  .1   .392340 .224997 .382662
skewed_cycle         u  .05  .369593 .215843 .414564
skewed_cycle         s3 1    .652345 .240727 .106928
skewed_cycle         s3 .1   .591386 .092861 .315753
skewed_cycle         s3 .05  .459067 .128652 .412281
skewed_cycle_and_one s4 1    .434709 .279192 .202205 .083893
skewed_cycle_and_one s4 .1   .459390 .170013 .342785 .027812
skewed_cycle_and_one s4 .05  .402181 .180675 .410108 .007036
bradley_terry        s3 1    .658693 .262145 .079162
bradley_terry        s3 .1   .946467 .047056 .006477
bradley_terry        s3 .05  .994816 .004896 .000288
rock_paper_scissors  s3 1    .641591 .234363 .124045
rock_paper_scissors  s3 .1   .432065 .230329 .337605
rock_paper_scissors  s3 .05  .377434 .276500 .346065
two_actions          u2 1    .549834 .450166
two_actions          u2 .1   .880797 .119203
"""

# The same at tau = 0.1 for the policies of IPO-MD and Nash-MD-PG: game, reference, beta, policy.
TARGETS = """
skewed_cycle         s3 .125 .600512 .074369 .325119
skewed_cycle         s3 .25  .613919 .057841 .328240
skewed_cycle         s3 .5   .665574 .034071 .300355
skewed_cycle         s3 1    .904741 .020379 .074880
skewed_cycle         u  .125 .404025 .216241 .379734
skewed_cycle         u  .25  .419267 .206998 .373735
skewed_cycle         u  .5   .465161 .189499 .345340
skewed_cycle         u  1    .576117 .211942 .211942
rock_paper_scissors  s3 .125 .415937 .203261 .380802
rock_paper_scissors  s3 .25  .396454 .168001 .435544
rock_paper_scissors  s3 .5   .349800 .079351 .570849
rock_paper_scissors  s3 1    .775263 .011705 .213032
skewed_cycle_and_one s4 .125 .473039 .155875 .343948 .027138
skewed_cycle_and_one s4 .25  .491734 .141455 .340715 .026096
skewed_cycle_and_one s4 .5   .552061 .115706 .309730 .022503
skewed_cycle_and_one s4 1    .721876 .126998 .139589 .011537
"""


def rows(table):
    for line in table.strip().splitlines():
        name, reference, number, *policy = line.split()
        yield name, reference, float(number), np.array(policy, float)


@pytest.mark.parametrize(("name", "reference", "tau", "expected"), rows(EQUILIBRIA))
def test_equilibrium_of_a_named_game(name, reference, tau, expected):
    preferences, reference = GAMES[name], REFERENCES[reference]
    found = equilibrium(preferences, reference, tau)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(duality_gap(preferences, found, reference, tau)) < 2e-15
    assert abs(found @ preferences @ found - 0.5) < 1e-15
    own = best_response(preferences, found, reference, tau)
    np.testing.assert_allclose(own, found, atol=1e-14)


@pytest.mark.parametrize(("name", "reference", "beta", "expected"), rows(TARGETS))
def test_targets_of_mixtures(name, reference, beta, expected):
    preferences, reference, tau = GAMES[name], REFERENCES[reference], 0.1
    found = equilibrium(preferences, reference, tau, beta=beta)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    mixed = mixture(found, reference, beta)
    if beta < 1:  # the mixture is the equilibrium of a game held more tightly
        tighter = equilibrium(preferences, reference, tau / (1 - beta))
        np.testing.assert_allclose(mixed, tighter, atol=1e-12)
        np.testing.assert_allclose(
            best_response(preferences, tighter, reference, tau), found, atol=1e-12
        )
    assert np.max(np.abs(found - equilibrium(preferences, reference, tau))) > 1e-3


def test_random_games_of_many_actions(rng):
    for actions in (2, 5, 20):
        preferences = random_preferences(rng, actions)
        reference = rng.dirichlet(np.ones(actions))
        for tau in (1.0, 0.1, 0.02):
            found = equilibrium(preferences, reference, tau)
            assert abs(duality_gap(preferences, found, reference, tau)) < 1e-13


def test_the_gap_is_what_the_best_players_gain():
    """Against a search over policies of two actions."""
    preferences, reference, tau = GAMES["two_actions"], np.array([0.2, 0.8]), 0.3
    policy = np.array([0.6, 0.4])

    def payoff(one, other):
        held = divergence(other, reference) - divergence(one, reference)
        return one @ preferences @ other + tau * held

    best = -minimize_scalar(
        lambda p: -payoff(np.array([p, 1 - p]), policy), bounds=(1e-9, 1 - 1e-9), method="bounded"
    ).fun
    worst = minimize_scalar(
        lambda p: payoff(policy, np.array([p, 1 - p])), bounds=(1e-9, 1 - 1e-9), method="bounded"
    ).fun
    found = duality_gap(preferences, policy, reference, tau)
    np.testing.assert_allclose(found, best - worst, atol=1e-9)


def test_no_equilibrium_where_rounding_drowns_it():
    with pytest.raises(UserError, match="larger tau"):
        equilibrium(GAMES["skewed_cycle_and_one"], REFERENCES["s4"], 1e-9)


def test_matrices_are_antisymmetric(rng):
    reward = np.array([0.3, -1.0, 2.0, 0.0])
    for matrix in (*GAMES.values(), cycle(7, 0.8), random_preferences(rng, 6)):
        np.testing.assert_allclose(matrix + matrix.T, 1, atol=1e-15)
    odds = bradley_terry(reward)
    np.testing.assert_allclose(np.log(odds / odds.T), reward[:, None] - reward, atol=1e-12)


def test_the_dice_are_dice():
    dice = ([2, 4, 9], [1, 6, 8], [3, 5, 7])
    for i, j in ((0, 1), (1, 2), (2, 0)):
        wins = np.mean([a > b for a in dice[i] for b in dice[j]])
        np.testing.assert_allclose(GAMES["dice"][i, j], wins)


def test_a_cycle_is_even_between_actions_that_are_not_neighbours():
    matrix = cycle(5, 0.9)
    assert matrix[4, 0] == matrix[2, 3] == 0.9
    assert matrix[0, 2] == matrix[1, 4] == 0.5


@pytest.mark.parametrize("entries", [{(0, 0): 0.5}, {(0, 1): 1.5}])
def test_entries_are_probabilities_of_two_actions(entries):
    with pytest.raises(UserError, match="two different actions"):
        antisymmetric(3, entries)
    with pytest.raises(UserError, match="3 or more"):
        cycle(2, 0.7)
