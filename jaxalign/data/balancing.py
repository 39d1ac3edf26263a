"""Groups of the same number of examples whose sizes add up to nearly the same."""

import numpy as np
from jaxtyping import Float, Int

TOLERANCE = 0.004
"""Groups above the mean by less than this fraction are not improved further."""
CANDIDATES = 2**17  # swaps that are compared at once
LOWEST = 16  # groups that a group swaps with, at first


def balanced_groups(
    sizes: Float[np.ndarray, "examples measures"], groups: int, rng: np.random.Generator
) -> Int[np.ndarray, "groups examples_per_group"]:
    """Random groups of equal counts with nearly equal sums of every measure.

    The examples are sorted by size and cut into as many strata as a group has members; each group
    gets a random member of each stratum. Then the largest group swaps members with others, as long
    as that makes it smaller and the others no larger than it was.

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
    totals = shares[members].sum(1)
    while True:
        worst = int(totals.max(1).argmax())
        if totals[worst].max() <= 1 + TOLERANCE or not _improve(members, totals, shares, worst):
            return members


def _improve(members: np.ndarray, totals: np.ndarray, shares: np.ndarray, worst: int) -> bool:
    """Swap a member of the worst group in place; whether that made it smaller."""
    count = members.shape[1]
    others = np.argsort(totals[:, totals[worst].argmax()], kind="stable")
    others = others[others != worst]
    most = max(1, CANDIDATES // count**2)
    for partners in (others[:LOWEST][:most], others[LOWEST:][:most]):
        if not len(partners):
            continue
        given = shares[members[worst]][:, None, None]  # [own, partners, theirs, measures]
        taken = shares[members[partners]][None]
        after = np.maximum(
            (totals[worst] - given + taken).max(-1),
            (totals[partners][None, :, None] + given - taken).max(-1),
        )
        own, at, theirs = np.unravel_index(int(after.argmin()), after.shape)
        if after[own, at, theirs] < totals[worst].max() - 1e-9:
            other = partners[at]
            moved = shares[members[worst, own]] - shares[members[other, theirs]]
            totals[worst] -= moved
            totals[other] += moved
            swapped = members[other, theirs], members[worst, own]
            members[worst, own], members[other, theirs] = swapped
            return True
    return False
