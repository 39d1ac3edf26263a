"""Duplicates: against sets and edit distances by brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.duplicates import jaccard, near_duplicates, shingles, token_overlap

IDS = st.lists(st.integers(0, 4), max_size=8)


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(a=IDS, b=IDS)
def test_overlap_is_symmetric_and_bounded_by_the_edit_distance(a, b):
    found = token_overlap(a, b)
    assert found == token_overlap(b, a)
    assert 0 <= found <= 1
    assert (found == 1) == (sorted(a) == sorted(b))
    assert found >= 1 - edit_distance(a, b) / max(len(a), len(b), 1) - 1e-12


def test_overlap_counts_a_token_as_often_as_both_have_it():
    assert token_overlap([1, 1, 2], [1, 3]) == pytest.approx(2 / 5)
    assert token_overlap([1], [2]) == 0


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcd"), max_size=9), st.lists(st.sampled_from("abcd"), max_size=9))
def test_shingles_are_sets_of_three_neighbouring_words(a, b):
    def runs(words):
        return {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}

    first, second = (shingles(f"  {', '.join(words).upper()}!") for words in (a, b))
    expected = len(runs(a) & runs(b)) / len(runs(a) | runs(b))
    assert jaccard(first, second) == pytest.approx(expected)


def test_the_planted_near_duplicates_are_found_and_no_others(rng):
    words = np.array([f"w{number}" for number in range(500)])
    texts = [" ".join(words[rng.integers(0, 500, 40)]) for _ in range(60)]
    copies = [f"{texts[at]}, {words[at]}!" for at in range(0, 60, 3)]  # a word more: J = 38 / 39
    far = [text.replace(" ", " x ", 25) for text in texts[:5]]
    found = near_duplicates([*texts, *copies, *far])
    expected = [*range(60), *range(0, 60, 3), *range(80, 85)]
    assert found.tolist() == expected


def test_groups_are_named_by_their_first_text():
    text = "one two three four five six seven eight nine ten"
    found = near_duplicates(["", "漢字", text, text.upper(), "", text + "!", "漢字"])
    assert found.tolist() == [0, 1, 2, 2, 0, 2, 1]
    assert len(near_duplicates([])) == 0
