"""Groups of the same number of examples whose sizes add up to nearly the same."""

import numpy as np
from jaxtyping import Int, Num

TOLERANCE = 0.004
"""Groups above the mean by less than this fraction are not improved further."""
CANDIDATES = 2**17  # swaps that are compared at once
LOWEST = 16  # groups that a group swaps with, at first
MOST = 16  # swaps per group


def balanced_groups(
    sizes: Num[np.ndarray, "examples measures"], groups: int, rng: np.random.Generator
) -> Int[np.ndarray, "groups examples_per_group"]:
    """Random groups of equal counts with nearly equal sums of every measure.

    The examples are sorted by size and cut into as many strata as a group has members; each group
    gets a random member of each stratum. Then the largest group that can swaps a member with
    another group, so that what both exceed the mean by falls, until no group exceeds it by much.

    Args:
      sizes: sizes of the examples, such as their tokens; a multiple of `groups` examples.
      groups: number of groups.
      rng: of the strata's random members.

    Returns:
      The numbers of the examples of each group.
    """
    members = np.argsort(-sizes.sum(1), kind="stable").reshape(-1, groups)
    members = rng.permuted(members, axis=1).T.copy()
    mean = sizes.sum(0) / groups
    shares = sizes / np.where(mean > 0, mean, 1)
    above = shares[members].sum(1) - (mean > 0)
    stuck = np.zeros(groups, bool)
    for _ in range(MOST * (groups - 1)):
        worst = int(np.where(stuck, -1, above.max(1)).argmax())
        if stuck[worst] or above[worst].max() <= TOLERANCE:
            break
        other = _swap(members, above, shares, worst)
        stuck[worst] = other is None
        if other is not None:
            stuck[other] = False
    return members


def _swap(members: np.ndarray, above: np.ndarray, shares: np.ndarray, worst: int) -> int | None:
    """Swap a member of the worst group in place; returns the other group, None: no swap helps."""
    groups, count = members.shape
    rivals = above[:, above[worst].argmax()].copy()
    rivals[worst] = np.inf
    most = max(1, min(groups - 1, CANDIDATES // count**2))
    for number in sorted({min(LOWEST, most), most}):
        partners = np.argpartition(rivals, number - 1)[:number]
        moved = shares[members[worst]][:, None, None] - shares[members[partners]][None]
        now = _cost(above[[worst]]) + _cost(above[partners])[None, :, None]
        after = _cost(above[worst] - moved) + _cost(above[partners][None, :, None] + moved)
        own, at, theirs = np.unravel_index(int((after - now).argmin()), after.shape)
        if after[own, at, theirs] < now[0, at, 0] * (1 - 1e-6):
            other = int(partners[at])
            above[worst] -= moved[own, at, theirs]
            above[other] += moved[own, at, theirs]
            swapped = members[other, theirs], members[worst, own]
            members[worst, own], members[other, theirs] = swapped
            return other
    return None


def _cost(above: np.ndarray) -> np.ndarray:
    """What is to fall: the squared excess over the mean, and a little of the squared deviation."""
    return np.square(np.maximum(above, 0)).sum(-1) + 0.01 * np.square(above).sum(-1)
