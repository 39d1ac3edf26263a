"""Groups of nearly equal sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.balancing import balanced_groups


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 12),
    count=st.integers(1, 9),
    measures=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_every_example_is_in_one_group_and_no_worse_than_chance(groups, count, measures, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 300, (groups * count, measures))
    found = balanced_groups(sizes, groups, np.random.default_rng(seed))
    assert found.shape == (groups, count)
    assert sorted(found.ravel()) == list(range(groups * count))
    by_chance = rng.permutation(groups * count).reshape(groups, count)
    largest = [sizes[x].sum(1).max(0) / np.maximum(sizes.sum(0), 1) for x in (found, by_chance)]
    assert largest[0].max() <= largest[1].max() * 1.02 + 0.004 / groups
    again = balanced_groups(sizes, groups, np.random.default_rng(seed))
    np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize("count", [8, 32])
def test_sums_of_long_tails_are_equal_to_half_a_percent(count, rng):
    """Log-normal prompts and responses, cut off, as in real preference data."""
    drawn = np.exp(rng.normal([5, 6], [0.9, 0.8], (40 * count, 2))).astype(int)
    prompts, responses = np.minimum(drawn, [800, 2000]).T
    sizes = np.stack([prompts + responses, responses], axis=1)
    sums = sizes[balanced_groups(sizes, 40, rng)].sum(1)
    assert (sums.max(0) / sums.mean(0)).max() < 1.005


def test_a_group_with_an_outlier_is_filled_up_with_small_ones(rng):
    sizes = rng.integers(50, 150, (320, 1))
    sizes[7] = 600
    sums = sizes[balanced_groups(sizes, 40, rng)].sum(1)
    assert sums.max() < 1.3 * sums.mean()  # 600 + 7 * 50 is 950, the mean about 810


def test_other_numbers_make_other_groups_of_the_same_examples(rng):
    sizes = rng.integers(10, 300, (160, 1))
    found = [balanced_groups(sizes, 20, np.random.default_rng(seed)) for seed in (0, 1)]
    sets = [{frozenset(group) for group in groups.tolist()} for groups in found]
    assert not sets[0] & sets[1]
