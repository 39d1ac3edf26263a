"""Batches: each example once, in an order that the seed decides, in few shapes, resumable."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import TokenizedPairs, TokenizedRows, TokenizedTexts, pair_batches, text_batches
from jaxalign.data.batches import choose_buckets
from jaxalign.data.order import BatchOrder
from jaxalign.errors import UserError


def make_rows(lengths, prompts, seed=0):
    rng = np.random.default_rng(seed)
    flat = [rng.integers(1, 99, n).astype(np.int32) for n in lengths]
    return TokenizedRows(
        flat=np.concatenate(flat),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_length=np.asarray(prompts, np.int32),
        record_index=np.arange(len(lengths)),
    )


def make_pairs(number, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, longest // 2, 2 * number)
    lengths = prompts + rng.integers(1, longest // 2, 2 * number)
    rows = make_rows(lengths, prompts, seed)
    index = np.repeat(np.arange(number), 2)
    return TokenizedPairs(
        rows=TokenizedRows(
            flat=rows.flat,
            offsets=rows.offsets,
            prompt_length=rows.prompt_length,
            record_index=index,
        )
    )


def make_texts(lengths, seed=0):
    rows = make_rows(lengths, np.ones(len(lengths)), seed)
    return TokenizedTexts(flat=rows.flat, offsets=rows.offsets, characters=0)


PAIRS = make_pairs(53)


def take(batches, number=None):
    return [next(batches) for _ in range(number)] if number else list(batches)


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def kept(batch):
    return batch.record_index[batch.weight > 0].tolist()


def test_every_pair_comes_once_an_epoch_in_an_order_of_the_seed():
    def epochs(seed):
        batches = take(pair_batches(PAIRS, batch_size=8, seed=seed, epochs=3))
        order = [i for batch in batches for i in kept(batch)]
        assert len(order) == 3 * 53
        return order

    first = epochs(0)
    assert np.bincount(first).tolist() == [3] * 53
    assert first == epochs(0)
    assert first != epochs(1)
    # shuffled over the whole set: neighbours in a batch are far apart in the file
    assert first[:53] != sorted(first[:53])
    assert np.abs(np.diff(first[:53])).mean() > 10


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 1000),
    batch_size=st.integers(1, 64),
    window=st.sampled_from([1, 2, 16]),
    shuffle=st.booleans(),
    epochs=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**31),
)
def test_every_epoch_holds_each_example_once_and_no_batch_holds_one_twice(
    examples, batch_size, window, shuffle, epochs, seed
):
    how = {"seed": seed, "shuffle": shuffle, "window": window, "epochs": epochs}
    lengths = np.random.default_rng(seed).integers(1, 300, examples)
    order = BatchOrder(lengths=lengths, batch_size=batch_size, drop_remainder=False, **how)
    number = -(-(epochs or 3) * examples // batch_size)
    assert order.num_batches == (None if epochs is None else number)
    batches = [order.batch(at) for at in range(number)]
    stream = np.concatenate(batches)
    for epoch in range(epochs or 3):
        once = stream[epoch * examples : (epoch + 1) * examples]
        assert sorted(once.tolist()) == list(range(examples))
    if examples >= batch_size:
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    fresh = BatchOrder(lengths=lengths, batch_size=batch_size, drop_remainder=False, **how)
    for at in np.random.default_rng(seed).permutation(number)[:5]:  # whatever was asked before
        np.testing.assert_array_equal(fresh.batch(int(at)), batches[at])


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (128, 32), (400, 32), (12, 5)])
def test_small_data_are_seen_whole_before_any_example_comes_again(examples, batch_size):
    pairs = make_pairs(examples)
    seen = []
    for batch in take(pair_batches(pairs, batch_size=batch_size), -(-examples // batch_size)):
        assert len(set(batch.record_index.tolist())) == batch_size
        seen += batch.record_index.tolist()
    assert set(seen[:examples]) == set(range(examples))


def test_examples_that_share_a_batch_with_another_epoch_are_chance():
    """Five examples in batches of four: who comes twice in a row must not be the order's choice."""
    order = BatchOrder(
        lengths=np.ones(5, int),
        batch_size=4,
        seed=0,
        shuffle=True,
        window=16,
        epochs=None,
        drop_remainder=False,
    )
    batches = [order.batch(at) for at in range(4000)]
    missing = [(set(range(5)) - set(batch.tolist())).pop() for batch in batches]
    counts = np.bincount(missing, minlength=5)
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def test_sorting_by_length_saves_padding_within_each_epoch():
    rng = np.random.default_rng(0)
    lengths = np.repeat(rng.integers(5, 400, 500), 2)
    pairs = TokenizedPairs(rows=make_rows(lengths, np.ones(1000)))

    def padded(window):
        buckets = tuple(range(8, 408, 8))  # as little as the order allows
        batches = take(pair_batches(pairs, batch_size=8, epochs=2, window=window, buckets=buckets))
        return sum(batch.tokens.size for batch in batches) / (2 * lengths.sum())

    assert padded(16) < 1.2 < 1.6 < padded(1)


def test_every_epoch_has_an_order_of_its_own():
    batches = take(pair_batches(PAIRS, batch_size=53, epochs=3, window=1))
    orders = [batch.record_index.tolist() for batch in batches]
    assert len({tuple(order) for order in orders}) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(53))}


def test_in_order_without_shuffling():
    batches = take(pair_batches(PAIRS, batch_size=8, shuffle=False, epochs=1))
    assert [i for batch in batches for i in kept(batch)] == list(range(53))


def test_a_batch_holds_its_pairs_and_nothing_else():
    for batch in take(pair_batches(PAIRS, batch_size=8, epochs=1)):
        for row in range(8):
            pair = int(batch.record_index[row])
            for side in (0, 1):
                whole = PAIRS.rows[2 * pair + side]
                prompt = batch.prompt_length[row, side]
                response = batch.response_length[row, side]
                assert prompt + response == len(whole)
                assert batch.tokens[row, side, : len(whole)].tolist() == whole.tolist()
                assert not batch.tokens[row, side, len(whole) :].any()
                answer = batch.response_tokens[row, side]
                assert answer[:response].tolist() == whole[prompt:].tolist()
                assert not answer[response:].any()


def test_a_last_partial_batch_is_filled_with_weight_0_or_dropped():
    batches = take(pair_batches(PAIRS, batch_size=8, epochs=1))
    assert len(batches) == 7
    assert sorted(b.weight.sum() for b in batches) == [5] + [8] * 6
    assert all(b.tokens.shape[0] == 8 for b in batches)
    dropped = take(pair_batches(PAIRS, batch_size=8, epochs=1, drop_remainder=True))
    assert [b.weight.sum() for b in dropped] == [8] * 6


def test_what_a_dropped_batch_leaves_out_is_chance_not_length():
    """Sorting within a window must not always leave the longest to the batch that is dropped."""
    lengths = np.arange(2, 55)
    pairs = TokenizedPairs(rows=make_rows(np.repeat(lengths, 2), np.ones(106)))
    left_out = []
    for seed in range(20):
        batches = pair_batches(pairs, batch_size=8, seed=seed, epochs=1, drop_remainder=True)
        used = [i // 2 for batch in batches for i in kept(batch)]
        assert len(used) == len(set(used)) == 48
        left_out += set(range(53)) - set(used)
    assert len(set(left_out)) > 30  # of 53; five longest alone would be 5
    assert 20 < lengths[left_out].mean() < 36  # 28 +- five standard errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window: 0 is not a number of batches"),
        ({"epochs": 0}, "epochs: 0 passes"),
        ({"process_index": 2, "process_count": 2}, "process_index: 2 is not one of 2 processes"),
        ({"batch_size": 0}, "batch_size: 0"),
    ],
)
def test_numbers_that_make_no_batches_are_named(options, said):
    with pytest.raises(UserError, match=said):
        pair_batches(PAIRS, **{"batch_size": 8} | options)


def test_few_shapes_and_little_padding():
    pairs = make_pairs(600, longest=200)
    batches = take(pair_batches(pairs, batch_size=8, epochs=1, buckets=4))
    shapes = {(b.tokens.shape, b.response_tokens.shape) for b in batches}
    assert 1 < len(shapes) <= 4
    padded = sum(b.tokens.size for b in batches)
    one_shape = take(pair_batches(pairs, batch_size=8, epochs=1, buckets=1))
    assert len({b.tokens.shape for b in one_shape}) == 1
    assert padded < 0.85 * sum(b.tokens.size for b in one_shape)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 4))
def test_buckets_are_the_best_there_are(lengths, most):
    """Against every choice of edges; a bucket more is taken where it saves a tenth."""
    from itertools import combinations

    rounded = sorted({-(-n // 8) * 8 for n in lengths})

    def cost(edges):
        return sum(min(e for e in edges if e >= n) for n in lengths)

    best = []
    for number in range(1, most + 1):
        options = [(*c, rounded[-1]) for c in combinations(rounded[:-1], number - 1)]
        if options:
            best.append(min(map(cost, options)))
    wanted = 0
    while wanted + 1 < len(best) and best[wanted + 1] < 0.9 * best[wanted]:
        wanted += 1
    chosen = choose_buckets(np.array(lengths), most=most)
    assert chosen[-1] == rounded[-1]
    assert cost(chosen) == best[wanted]


def test_given_buckets_must_hold_the_longest():
    with pytest.raises(UserError, match="let the largest be at least"):
        pair_batches(PAIRS, batch_size=8, buckets=(8, 16))


@pytest.mark.parametrize("number", [1, 5, 9])
def test_the_state_of_the_iterator_goes_on_exactly_there(number):
    whole = take(pair_batches(PAIRS, batch_size=8, seed=3), number + 20)
    batches = pair_batches(PAIRS, batch_size=8, seed=3)
    take(batches, number)
    state = json.loads(json.dumps(batches.get_state()))
    fresh = pair_batches(PAIRS, batch_size=8, seed=3)
    fresh.set_state(state)
    after = take(fresh, 20)  # over the end of the epoch
    assert all(equal(a, b) for a, b in zip(after, whole[number:], strict=True))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(processes):
    whole = take(pair_batches(PAIRS, batch_size=8, seed=1, epochs=2))
    shares = [
        take(
            pair_batches(
                PAIRS, batch_size=8, seed=1, epochs=2, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        for name, value in vars(batch).items():
            if value is None:  # no joint rows
                continue
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, value, err_msg=name)


def test_a_share_of_the_batch_must_be_whole():
    with pytest.raises(UserError, match="not a multiple of the 3 processes"):
        pair_batches(PAIRS, batch_size=8, process_count=3)
    with pytest.raises(UserError, match="partial batches are dropped"):
        pair_batches(PAIRS, batch_size=64, epochs=1, drop_remainder=True)


@pytest.mark.parametrize("prefetch", [1, 16])
def test_threads_do_not_change_the_order(prefetch):
    plain = take(pair_batches(PAIRS, batch_size=4, seed=2), 30)
    ahead = take(pair_batches(PAIRS, batch_size=4, seed=2, prefetch=prefetch), 30)
    assert all(equal(a, b) for a, b in zip(plain, ahead, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=12),
    length=st.integers(2, 9),
    shuffle=st.booleans(),
)
def test_every_token_of_a_text_but_the_first_is_scored_once(lengths, length, shuffle):
    texts = make_texts(lengths)
    rows = []
    for batch in text_batches(texts, batch_size=2, length=length, epochs=1, shuffle=shuffle):
        for at in np.flatnonzero(batch.weight):
            rows.append([getattr(batch, n)[at] for n in ("tokens", "segment_ids", "positions")])
            mask, (tokens, segments, positions) = batch.target_mask[at], rows[-1]
            rows[-1].append(mask)
            real = segments > 0
            assert not tokens[~real].any()
            assert not mask[~real].any()
            starts = np.flatnonzero(np.diff(np.concatenate([[0], segments[real]])))
            assert segments[real][starts].tolist() == list(range(1, len(starts) + 1))
            assert (positions[real][starts] == 0).all()
            inside = np.diff(segments[real]) == 0
            assert (np.diff(positions[real])[inside] == 1).all()
            assert not mask[real][starts].any()
    # (token before, token) of every scored token: those of the documents, each once
    scored = sorted(
        (int(tokens[i - 1]), int(tokens[i]))
        for tokens, _, _, mask in rows
        for i in np.flatnonzero(mask)
    )
    documents = [texts[i].tolist() for i in range(len(texts))]
    assert scored == sorted(p for d in documents for p in itertools.pairwise(d))


def test_rows_of_text_begin_where_the_row_before_ended():
    texts = make_texts([30])
    batches = text_batches(texts, batch_size=1, length=8, epochs=1, shuffle=False)
    rows = [batch.tokens[0] for batch in batches]
    assert [row[0] for row in rows[1:]] == [row[-1] for row in rows[:-1]]


def test_rows_that_cannot_be_made_say_so():
    with pytest.raises(UserError, match="leaves nothing to predict"):
        text_batches(make_texts([5]), batch_size=1, length=1)
    with pytest.raises(UserError, match="single token"):
        text_batches(make_texts([1]), batch_size=1, length=4)


def joined_pairs():
    """Pairs of rows that begin alike: (prompt, chosen response, rejected response) lengths."""
    sizes = [(20, 4, 6), (3, 2, 2), (18, 1, 8), (5, 5, 5), (2, 9, 9)]
    flat, lengths = [], []
    for prompt, chosen, rejected in sizes:
        shared = np.arange(100, 100 + prompt)
        flat += [shared, np.arange(chosen), shared, 50 + np.arange(rejected)]
        lengths += [prompt + chosen, prompt + rejected]
    return sizes, TokenizedPairs(
        rows=TokenizedRows(
            flat=np.concatenate(flat).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            prompt_length=np.repeat([prompt for prompt, *_ in sizes], 2).astype(np.int32),
            record_index=np.repeat(np.arange(len(sizes)), 2),
        )
    )


def test_joint_rows_hold_each_token_of_a_pair_once():
    sizes, pairs = joined_pairs()
    once = {"batch_size": 1, "epochs": 1, "shuffle": False, "buckets": (16, 32), "window": 1}
    batches = take(pair_batches(pairs, **once, joint_share=1.0))
    for batch, (prompt, chosen, rejected) in zip(batches, sizes, strict=True):
        assert batch.common_length == [prompt]
        row = batch.joint_tokens[0].tolist()
        real = [*range(100, 100 + prompt), *range(chosen), *range(50, 50 + rejected)]
        assert row == real + [0] * (len(row) - len(real))
        assert row[: prompt + chosen] == batch.tokens[0, 0, : prompt + chosen].tolist()


def test_joint_rows_are_made_where_they_save_enough():
    _, pairs = joined_pairs()
    once = {"batch_size": 1, "epochs": 1, "shuffle": False, "buckets": (16, 32), "window": 1}

    def made(share):
        batches = take(pair_batches(pairs, **once, joint_share=share))
        return {
            batch.tokens.shape[-1]: None
            if batch.joint_tokens is None
            else batch.joint_tokens.shape[1]
            for batch in batches
        }

    assert made(0.0) == {16: None, 32: None}
    assert made(0.6) == {16: None, 32: 32}  # 24 of 2 x 16 tokens; 32 of 2 x 32
    assert made(0.75) == {16: 24, 32: 32}
