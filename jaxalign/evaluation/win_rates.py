"""Win rates with their intervals, and win rates at equal length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, Num

from jaxalign.evaluation.logistic import fit_logistic

RESAMPLES = 2000
ROUNDS = 500
RIDGE = 1e-3
"""Keeps the coefficients finite where a judge looks at nothing but length; worth a thousandth of a
comparison."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often one policy's response was preferred to the other's."""

    rate: float
    """Mean preference; ties and doubts count by halves. NaN without a verdict."""
    wins: int
    ties: int
    losses: int
    failures: int
    """Comparisons without a verdict, left out of all the rest."""
    wilson: tuple[float, float]
    bootstrap: tuple[float, float]


def win_rate(
    preference: Float64[np.ndarray, " n"],
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> WinRate:
    """Mean preference with its intervals.

    Args:
      preference: P(ours is better), NaN where there is no verdict.
      groups: what is resampled together, one per comparison; by default each by itself. Give the
        prompts where a prompt has several responses.
      confidence: of the intervals.
      resamples: of the bootstrap.
      seed: of the bootstrap.
    """
    known = np.isfinite(preference)
    own = preference[known]
    members = None if groups is None else [x for x, has in zip(groups, known, strict=True) if has]
    rate = float(own.mean()) if len(own) else float("nan")
    return WinRate(
        rate=rate,
        wins=int((own > 0.5).sum()),
        ties=int((own == 0.5).sum()),
        losses=int((own < 0.5).sum()),
        failures=int((~known).sum()),
        wilson=wilson(rate, len(own), confidence=confidence),
        bootstrap=bootstrap_mean(
            own, members, confidence=confidence, resamples=resamples, seed=seed
        ),
    )


def wilson(rate: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval of a share.

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4 n^2}}{1 + z^2 / n}

    With ties and soft preferences it is wider than it need be: nothing in [0, 1] varies more than
    wins and losses do.

    Args:
      rate: the share p.
      n: of how many.
      confidence: default 95 %.

    References:
      Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not n:
        return float("nan"), float("nan")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = rate + z**2 / (2 * n)
    half = z * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_mean(
    values: Float64[np.ndarray, " n"],
    groups: Sequence[object] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a mean; what shares a prompt is drawn together.

    Two policies judged against a third one on the same prompts are compared in pairs by giving
    the differences of their preferences: what is hard for both does not count as noise then.

    Args:
      values: one per comparison.
      groups: as in `win_rate`.
      confidence: as in `win_rate`.
      resamples: as in `win_rate`.
      seed: as in `win_rate`.
    """
    if not len(values):
        return float("nan"), float("nan")
    of = _numbered(groups, len(values))
    total, count = np.bincount(of, values), np.bincount(of).astype(np.float64)
    means = []
    for weight in resampled(len(total), resamples, seed):
        means.append((weight @ total) / (weight @ count))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _numbered(groups: Sequence[object] | None, n: int) -> np.ndarray:
    """The number of each one's group, from 0; without groups each is its own."""
    number: dict[object, int] = {}
    return np.array([number.setdefault(x, len(number)) for x in groups or range(n)], np.int64)


def resampled(
    size: int, resamples: int, seed: int, block: int = 250
) -> Iterator[Float64[np.ndarray, "resamples size"]]:
    """How often each of `size` is drawn, in blocks [resamples, size] of float64."""
    rng = np.random.default_rng(seed)
    for begin in range(0, resamples, block):
        number = min(block, resamples - begin)
        drawn = rng.integers(size, size=(number, size)) + size * np.arange(number)[:, None]
        yield (
            np.bincount(drawn.ravel(), minlength=number * size).reshape(number, size).astype(float)
        )


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """A win rate had both sides been equally long."""

    rate: float
    interval: tuple[float, float]
    length_effect: float
    """Log-odds per unit of tanh(length difference / its standard deviation)."""


def length_controlled(
    preference: Float64[np.ndarray, " n"],
    first_length: Num[np.ndarray, " n"],
    second_length: Num[np.ndarray, " n"],
    *,
    difficulty: Float64[np.ndarray, " n"] | None = None,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> LengthControlled:
    r"""The win rate that a logistic model predicts for responses of equal length.

    .. math:: P(\text{first better}) = \sigma\left(\theta
              + \phi \tanh\frac{\Delta_x}{\operatorname{sd}(\Delta)} + \psi \gamma_x\right),
              \qquad \text{rate} = \operatorname{mean}_x \sigma(\theta + \psi \gamma_x)

    with the length difference :math:`\Delta` and a difficulty :math:`\gamma_x` of each prompt.
    Without difficulties this is AlpacaEval's minimal formula. AlpacaEval 2 itself takes
    difficulties from a table fitted to the models of its leaderboard, penalises with an L1 norm
    chosen by cross-validation, and adds verbose and concise copies of the baseline with small
    weights; here there is a weak ridge, and no copies.

    Args:
      preference: P(first is better), NaN where there is no verdict.
      first_length: characters.
      second_length: characters.
      difficulty: as `instruction_difficulty` gives it; None leaves the term out.
      groups: as in `win_rate`.
      confidence: of the interval, which is the bootstrap's.
      resamples: of the bootstrap; the model is fitted to each.
      seed: of the bootstrap.

    References:
      Dubois et al. 2024, arXiv:2404.04475, section 3 and equation 2.
    """
    known = np.isfinite(preference)
    if not known.any():
        nan = float("nan")
        return LengthControlled(rate=nan, interval=(nan, nan), length_effect=nan)
    target = preference[known]
    columns = [np.ones(len(target)), length_feature(first_length, second_length)[known]]
    if difficulty is not None:
        columns.append(difficulty[known])
    design = np.stack(columns, 1)
    level = design.copy()
    level[:, 1] = 0

    def fitted(weight: np.ndarray) -> tuple[float, float]:
        w = fit_logistic(design, target, weight=weight, ridge=RIDGE)
        return float(weight @ (0.5 + 0.5 * np.tanh(level @ w / 2)) / weight.sum()), float(w[1])

    rate, effect = fitted(np.ones(len(target)))
    members = None if groups is None else [x for x, has in zip(groups, known, strict=True) if has]
    of = _numbered(members, len(target))
    drawn = resampled(int(of.max()) + 1, resamples, seed)
    rates = [fitted(x[of])[0] for block in drawn for x in block]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(rates, tails) if rates else (np.nan, np.nan)
    return LengthControlled(rate=rate, interval=(float(low), float(high)), length_effect=effect)


def length_feature(
    first_length: Num[np.ndarray, "*shape"], second_length: Num[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """The difference of lengths in standard deviations (not centred: 0 is equal), through tanh."""
    difference = np.asarray(first_length, np.float64) - np.asarray(second_length, np.float64)
    spread = difference.std()
    return np.tanh(difference / spread) if spread else np.sign(difference)


def instruction_difficulty(
    preference: Float64[np.ndarray, "models n"],
    feature: Float64[np.ndarray, "models n"],
    *,
    ridge: float = 1.0,
) -> Float64[np.ndarray, " n"]:
    r"""How much more often all models beat a baseline on a prompt than on others, in log-odds.

    .. math:: P_{mx} = \sigma(\theta_m + \phi_m f_{mx} + \gamma_x), \quad
              \gamma_x \sim N(0, 1 / \lambda)

    Args:
      preference: of each model over the baseline, NaN where there is no verdict.
      feature: `length_feature` of each.
      ridge: lambda; the prior of one nat is ours.

    Returns:
      gamma, positive where the models win more often than elsewhere.

    References:
      Dubois et al. 2024, arXiv:2404.04475, section 3 (gamma is fitted jointly over models).
    """
    known = np.isfinite(preference)
    target = np.where(known, preference, 0.5)
    of_models = np.zeros((len(target), 2))
    gamma = np.zeros(target.shape[1])
    for _ in range(ROUNDS):  # models given prompts, prompts given models: convex, so it gets there
        for m, row in enumerate(known):
            design = np.stack([np.ones(row.sum()), feature[m][row]], 1)
            of_models[m] = fit_logistic(design, target[m][row], offset=gamma[row], ridge=RIDGE)
        offset = of_models[:, :1] + of_models[:, 1:] * feature
        before = gamma
        for _ in range(5):
            p = 0.5 + 0.5 * np.tanh((offset + gamma) / 2)
            slope = (known * (p - target)).sum(0) + ridge * gamma
            gamma = gamma - slope / ((known * p * (1 - p)).sum(0) + ridge)
        if np.abs(gamma - before).max() < 1e-9:
            break
    return gamma


def moved_far(rate: float, controlled: float) -> bool:
    """Whether length control moves a win rate so far that it should be looked at.

    More than ten points, and more than a quarter of the room there was in that direction.
    """
    moved = controlled - rate
    room = 1 - rate if moved > 0 else rate
    return abs(moved) > 0.1 and abs(moved) > 0.25 * room
