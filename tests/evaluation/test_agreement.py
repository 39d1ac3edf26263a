"""Judges beside labels, by hand-counted tables."""

import numpy as np
import pytest

from jaxalign.evaluation import agreement, cohens_kappa


def test_kappa_of_a_counted_table():
    """20 and 15 agreements, 5 and 10 disagreements of 50: observed 0.7, chance 0.5."""
    a = np.repeat([1.0, 1.0, 0.0, 0.0], [20, 5, 10, 15])
    b = np.repeat([1.0, 0.0, 1.0, 0.0], [20, 5, 10, 15])
    assert cohens_kappa(a, b) == pytest.approx(0.4)


def test_accuracy_and_kappa_do_not_depend_on_which_side_is_first(rng):
    said = rng.choice([0.0, 0.2, 0.5, 0.9, np.nan], size=200)
    label = np.ones(200)
    swap = rng.uniform(size=200) < 0.5
    one = agreement(said, label)
    other = agreement(np.where(swap, 1 - said, said), np.where(swap, 0.0, 1.0))
    assert one == other
    known = said[np.isfinite(said)]
    right, tied = (known > 0.5).mean(), (known == 0.5).mean()
    assert one.accuracy == pytest.approx(right + tied / 2)
    # rater's shares over both orders: ties t, either side (1 - t) / 2; labels half and half
    assert one.kappa == pytest.approx((right - (1 - tied) / 2) / (1 - (1 - tied) / 2))
    assert one.failures == 200 - len(known)


def test_labelled_ties_count_for_kappa_alone():
    found = agreement(np.array([1.0, 0.5, 0.0]), np.array([1.0, 0.5, 0.5]))
    assert found.accuracy == 1.0
    assert found.number == 3
    assert found.kappa < 1.0
    assert found.interval[1] == pytest.approx(1.0)
