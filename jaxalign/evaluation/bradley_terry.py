"""Many policies at once: Bradley-Terry strengths on Elo's scale, matrices, cycles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64
from scipy.sparse.csgraph import connected_components

from jaxalign.errors import UserError
from jaxalign.evaluation.logistic import fit_logistic
from jaxalign.evaluation.win_rates import RESAMPLES, resampled

SCALE = 400 / math.log(10)
"""Elo points in a nat: 400 points are odds of ten to one."""
CENTRE = 1000.0
PRIOR = 1 / 9
"""Ridge where the maximum-likelihood strengths are infinite: a prior of three nats, 521 points."""


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Strengths of players, on Elo's scale with mean 1000."""

    elo: Float64[np.ndarray, " players"]
    low: Float64[np.ndarray, " players"]
    high: Float64[np.ndarray, " players"]
    finite: bool
    """Whether the maximum-likelihood strengths are finite; if not, a weak prior shrinks them."""


def ratings(
    games: Float64[np.ndarray, "prompts players players"],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratings:
    """Bradley-Terry ratings of policies that were compared on the same prompts.

    Args:
      games: [x, i, j] is P(i's response to x is better than j's), NaN where they were not compared;
        [x, j, i] is 1 less that.
      confidence: of the percentile intervals of the bootstrap over prompts.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      UserError: some policies were never compared, directly or through others.
    """
    won = np.nan_to_num(games, nan=0.0)
    players = games.shape[1]
    won[:, range(players), range(players)] = 0
    total = won.sum(0)
    if not _connected(total + total.T):
        raise UserError("some policies share no judged prompt with the others; judge more pairs")
    elo = to_elo(strengths(total))
    flat = won.reshape(len(won), -1)
    drawn = [
        to_elo(strengths(wins.reshape(players, players)))
        for weight in resampled(len(won), resamples, seed)
        for wins in weight @ flat
    ]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(drawn, tails, axis=0) if drawn else np.full((2, players), np.nan)
    return Ratings(elo=elo, low=low, high=high, finite=_connected(total))


def strengths(won: Float64[np.ndarray, "players players"]) -> Float64[np.ndarray, " players"]:
    r"""Maximum-likelihood strengths of the Bradley-Terry model, in nats, with mean 0.

    .. math:: P(i \succ j) = \sigma(s_i - s_j)

    They are finite exactly where every player can be reached from every other one by a chain of
    wins; otherwise a prior N(0, 9) keeps them so.

    Args:
      won: [i, j] is how often i won against j, ties as half a win for both.

    References:
      Bradley and Terry 1952; Ford 1957 on when the maximum exists.
    """
    players = len(won)
    pairs = [(i, j) for i, j in combinations(range(players), 2) if won[i, j] + won[j, i] > 0]
    if not pairs:
        return np.zeros(players)
    design = np.zeros((len(pairs), players))
    for row, (i, j) in enumerate(pairs):
        design[row, i], design[row, j] = 1, -1
    games = np.array([won[i, j] + won[j, i] for i, j in pairs])
    share = np.array([won[i, j] for i, j in pairs]) / games
    ridge = 0.0 if _connected(won) else PRIOR
    fitted = fit_logistic(design, share, weight=games, ridge=ridge)
    return fitted - fitted.mean()


def to_elo(strength: Float64[np.ndarray, " players"]) -> Float64[np.ndarray, " players"]:
    """Nats as points of Elo's scale around 1000."""
    return CENTRE + SCALE * strength


def _connected(won: np.ndarray) -> bool:
    """Whether a chain of wins leads from every player to every other one."""
    return connected_components(won > 0, connection="strong", return_labels=False) <= 1


@dataclass(frozen=True, kw_only=True)
class Pairings:
    """One policy against another over all pairings of their seeds."""

    mean: float
    std: float
    """Over the pairings, with n - 1; 0 for a single one."""
    number: int


def over_seeds(rates: Sequence[float]) -> Pairings:
    """Mean and standard deviation of win rates, one per pairing of seeds.

    Args:
      rates: e.g. nine, of three seeds against three.

    References:
      Calandriello et al. 2024, arXiv:2403.08635, table 2 (mean and std over 3 x 3 pairings).
    """
    known = np.array([rate for rate in rates if np.isfinite(rate)])
    if not len(known):
        return Pairings(mean=math.nan, std=math.nan, number=0)
    std = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return Pairings(mean=float(known.mean()), std=std, number=len(known))


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """How often three responses beat each other in a circle."""

    cyclic: int
    triples: int
    """With three verdicts and no tie."""

    @property
    def rate(self) -> float:
        """Share of the triples; 0 for any order, 1/4 for verdicts by coin."""
        return self.cyclic / self.triples if self.triples else math.nan


def cycles(games: Float64[np.ndarray, "prompts players players"]) -> Cycles:
    """Transitivity violations among all triples of responses to the same prompt.

    Args:
      games: as in `ratings`.
    """
    cyclic = triples = 0
    for i, j, k in combinations(range(games.shape[1]), 3):
        around = np.stack([games[:, i, j], games[:, j, k], games[:, k, i]]) - 0.5
        known = np.isfinite(around).all(0) & (around != 0).all(0)
        triples += int(known.sum())
        cyclic += int((np.abs(np.sign(around[:, known]).sum(0)) == 3).sum())
    return Cycles(cyclic=cyclic, triples=triples)
