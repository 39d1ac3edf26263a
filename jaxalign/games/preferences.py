r"""Preference matrices: P[i, j] is the probability that action i is preferred to action j.

Every matrix here has P + P^T = 1, so a half on the diagonal. All are float64.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from jaxalign.errors import UserError

Preferences = Float[np.ndarray, "actions actions"]


def antisymmetric(actions: int, entries: Mapping[tuple[int, int], float]) -> Preferences:
    """The matrix with the given entries, their complements, and 1/2 elsewhere.

    Args:
      actions: number of actions.
      entries: (i, j) -> probability that action i is preferred to action j, in [0, 1].

    Returns:
      Preferences, [actions, actions].

    Raises:
      UserError: an entry is not a probability, or is on the diagonal.
    """
    matrix = np.full((actions, actions), 0.5)
    for (i, j), probability in entries.items():
        if i == j or not 0 <= probability <= 1:
            raise UserError(
                f"preference ({i}, {j}) = {probability}: give two different actions and a "
                "probability in [0, 1]"
            )
        matrix[i, j], matrix[j, i] = probability, 1 - probability
    return matrix


def bradley_terry(rewards: Float[np.ndarray, " actions"]) -> Preferences:
    r"""Preferences by the Bradley-Terry model.

    .. math:: P_{ij} = \sigma(r_i - r_j)

    Args:
      rewards: reward of each action, [actions].

    Returns:
      Preferences, [actions, actions].
    """
    return expit(rewards[:, None] - rewards[None, :])


def cycle(actions: int, probability: float) -> Preferences:
    """Every action is preferred to the next one, and the last to the first.

    Args:
      actions: number of actions, >= 3.
      probability: of each of these preferences, in [0, 1]; other pairs are even.

    Returns:
      Preferences, [actions, actions].

    Raises:
      UserError: fewer than three actions make no cycle.
    """
    if actions < 3:
        raise UserError(f"a cycle of {actions} actions: give 3 or more")
    return antisymmetric(actions, {(i, (i + 1) % actions): probability for i in range(actions)})


def random_preferences(rng: np.random.Generator, actions: int) -> Preferences:
    """Independent preferences, uniform on [0, 1]; most have cycles.

    Args:
      rng: generator of random numbers.
      actions: number of actions.

    Returns:
      Preferences, [actions, actions].
    """
    below = np.tril(rng.uniform(size=(actions, actions)), -1)
    return below + np.triu(1 - below.T, 1) + np.eye(actions) / 2


SKEWED = {(0, 1): 0.9, (1, 2): 0.8, (2, 0): 0.7}

GAMES: dict[str, Preferences] = {
    "dice": cycle(3, 5 / 9),  # Efron-like dice {2, 4, 9}, {1, 6, 8}, {3, 5, 7}
    "skewed_cycle": antisymmetric(3, SKEWED),
    "skewed_cycle_and_one": antisymmetric(4, SKEWED | {(0, 3): 0.6, (1, 3): 0.95, (2, 3): 0.55}),
    "bradley_terry": bradley_terry(np.array([1.0, 0.0, -0.5])),
    "rock_paper_scissors": cycle(3, 1.0),
    "two_actions": antisymmetric(2, {(0, 1): 0.7}),
}
"""Named games. Symmetric cycles need a reference that is not uniform; otherwise training starts at
the equilibrium."""
