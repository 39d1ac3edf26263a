"""Ratings of many policies: closed forms, strengths known in advance, cycles."""

import math

import numpy as np
import pytest
from scipy import optimize, special

from jaxalign.errors import UserError
from jaxalign.evaluation import cycles, over_seeds, ratings, strengths


def both_ways(upper):
    """games[x, i, j] from the half above the diagonal."""
    return np.triu(upper, 1) + np.tril(1 - upper.transpose(0, 2, 1), -1)


def test_two_players_are_the_log_odds():
    """60 wins, 20 ties, 20 losses: 400 log10(70 / 30) points."""
    outcomes = np.repeat([1.0, 0.5, 0.0], [60, 20, 20])
    games = np.full((100, 2, 2), np.nan)
    games[:, 0, 1], games[:, 1, 0] = outcomes, 1 - outcomes
    found = ratings(games, resamples=500)
    gap = 400 * math.log10(70 / 30)
    assert gap == pytest.approx(147.19, abs=0.01)
    assert found.elo == pytest.approx([1000 + gap / 2, 1000 - gap / 2], abs=1e-6)
    assert found.finite
    assert found.low[0] < found.elo[0] < found.high[0]


def test_strengths_are_scipys(rng):
    won = rng.uniform(1, 30, size=(5, 5))

    def objective(s):
        return -np.sum(np.triu(won, 1) * special.log_expit(s[:, None] - s)) - np.sum(
            np.tril(won, -1) * special.log_expit(s[:, None] - s)
        )

    best = optimize.minimize(objective, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(strengths(won), best - best.mean(), atol=1e-6)


def test_known_strengths_are_recovered_and_mostly_inside_the_intervals(rng):
    true = np.array([1.2, 0.4, 0.0, -0.5, -1.1])
    probability = special.expit(true[:, None] - true)
    games = both_ways((rng.uniform(size=(3000, 5, 5)) < probability).astype(float))
    found = ratings(games, resamples=200)
    elo = 1000 + 400 / math.log(10) * true
    np.testing.assert_allclose(found.elo, elo, atol=15)
    assert ((found.low <= elo) & (elo <= found.high)).sum() >= 4


def test_policies_that_always_win_are_held_back():
    games = both_ways(np.ones((50, 3, 3)))
    found = ratings(games, resamples=20)
    assert not found.finite
    assert np.isfinite(found.elo).all()
    assert (np.diff(found.elo) < -100).all()


def test_players_who_never_met_cannot_be_rated():
    games = np.full((4, 4, 4), np.nan)
    games[:, 0, 1], games[:, 1, 0] = 0.6, 0.4
    games[:, 2, 3], games[:, 3, 2] = 0.6, 0.4
    with pytest.raises(UserError, match="share no judged prompt"):
        ratings(games)
    games[0, 1, 2], games[0, 2, 1] = 0.3, 0.7  # one bridge will do
    assert ratings(games, resamples=0).finite


def test_cycles_of_a_circle_an_order_and_coins(rng):
    circle = both_ways(np.array([[[0, 0.9, 0.2], [0, 0, 0.8], [0, 0, 0]]]))
    assert (cycles(circle).cyclic, cycles(circle).triples) == (1, 1)
    scores = rng.normal(size=(50, 5))
    order = (scores[:, :, None] > scores[:, None]).astype(float)
    assert cycles(order).cyclic == 0
    assert cycles(order).triples == 50 * 10
    coins = both_ways((rng.uniform(size=(4000, 3, 3)) < 0.5).astype(float))
    assert cycles(coins).rate == pytest.approx(0.25, abs=0.03)


def test_ties_and_missing_verdicts_make_no_triple():
    games = both_ways(np.ones((2, 3, 3)))
    games[0, 0, 1] = games[0, 1, 0] = 0.5
    games[1, 0, 2] = games[1, 2, 0] = np.nan
    assert cycles(games).triples == 0
    assert math.isnan(cycles(games).rate)


def test_pairings_of_seeds():
    rates = [0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.6, 0.7, 0.8]
    found = over_seeds([*rates, float("nan")])
    assert found.mean == pytest.approx(0.6)
    assert found.std == pytest.approx(math.sqrt(0.12 / 8))
    assert found.number == 9
    assert over_seeds([0.3]).std == 0.0
