"""Packed batches: the pairs' own tokens and nothing else, in one shape, in an order of the seed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import TokenizedPairs, TokenizedResponses
from jaxalign.data.order import batch_order
from jaxalign.data.packing import Packing, packed_batches, packed_sizes, packer_of
from jaxalign.errors import UserError
from tests.data.test_batches import kept, make_pairs, make_rows, take

PAIRS = make_pairs(53)


def make_alike(number, seed=0, longest=40):
    """Pairs whose rows begin alike: prompts, or more, or nothing, or all of the shorter row."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(1, longest, number), 2)
    lengths = prompts + rng.integers(1, longest, 2 * number)
    rows = make_rows(lengths, prompts, seed)
    for pair in range(number):
        chosen, rejected = rows[2 * pair], rows[2 * pair + 1]
        most = min(len(chosen), len(rejected))
        same = [prompts[2 * pair], most, 0, most // 2][pair % 4]
        rejected[:same] = chosen[:same]
        if pair % 4 == 2:
            rejected[0] = chosen[0] % 98 + 1
    rows.record_index[:] = np.repeat(np.arange(number), 2)
    return TokenizedPairs(rows=rows)


def unpacked(packed):
    """Each example's prompts with their responses, read from the packed rows alone."""
    pairs = []
    numbers = packed.row_number.tolist()
    for row, starts in zip(packed.row, packed.scored_start, strict=True):
        at = numbers.index(row)
        first = packed.scored_positions[at, starts[0]]
        segment = (packed.segment_ids[at, first] - 1) // 3 * 3
        tokens, ids = packed.tokens[at], packed.segment_ids[at]
        positions = packed.positions[at]
        sides = []
        for side in range(packed.scored_start.shape[1]):
            mine = (ids == segment + 1) | (ids == segment + 2 + side)
            assert positions[mine].tolist() == list(range(mine.sum()))
            sides.append(tokens[mine].tolist())
        pairs.append((at, segment, sides))
    return pairs


@settings(max_examples=30, deadline=None)
@given(
    number=st.integers(1, 60),
    shards=st.sampled_from([1, 2]),
    micro_batches=st.sampled_from([1, 2]),
    form=st.sampled_from([TokenizedPairs, TokenizedResponses]),
    seed=st.integers(0, 2**31),
)
def test_packed_rows_hold_the_batchs_examples_and_nothing_else(
    number, shards, micro_batches, form, seed
):
    pairs = form(rows=make_alike(number, seed=seed).rows)
    pairs.rows.record_index[:] = np.arange(len(pairs.rows)) // form.sides
    packing = Packing(shards=shards, micro_batches=micro_batches)
    batches = take(packed_batches(pairs, packing, batch_size=8, seed=seed), 12)
    shapes = set()
    for batch in batches:
        packed = batch.packed
        shapes.add(batch.tokens.shape)
        if packed is None:
            continue
        shapes.add((packed.tokens.shape, packed.scored_tokens.shape))
        real = 0
        for place, (at, segment, sides) in enumerate(unpacked(packed)):
            # the micro-batch, and the shard, of a pair are its row's
            assert at % micro_batches == place % micro_batches
            assert at // micro_batches == place // (8 // shards)
            index = int(batch.record_index[place])
            for side, tokens in enumerate(sides):
                whole = pairs.rows[form.sides * index + side]
                assert tokens == whole.tolist()
                prompt = int(batch.prompt_length[place, side])
                assert batch.tokens[place, side, : len(whole)].tolist() == tokens
                scored = packed.scored_start[place, side] + np.arange(len(whole) - prompt)
                assert packed.scored_tokens[at, scored].tolist() == tokens[prompt:]
                where = packed.scored_positions[at, scored]
                assert packed.tokens[at, where].tolist() == tokens[prompt - 1 : -1]
                last = packed.last[place, side]
                assert packed.tokens[at, last] == tokens[-1]
                assert packed.positions[at, last] == len(tokens) - 1
                assert packed.segment_ids[at, last] - segment in (1, side + 2)
                ids = packed.segment_ids[at, where] - segment
                assert set(ids.tolist()) <= {1, side + 2}
                assert packed.positions[at, where].tolist() == list(
                    range(prompt - 1, len(whole) - 1)
                )
            real += packed_sizes(pairs)[index, 0]
        assert real == (packed.segment_ids > 0).sum()
        assert packed.reach >= packed_sizes(pairs)[:, 0].max()
    assert len(shapes) <= 2


@settings(max_examples=20, deadline=None)
@given(
    number=st.integers(1, 60),
    shards=st.sampled_from([1, 2]),
    micro_batches=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_rows_apart_hold_each_response_with_its_prompt(number, shards, micro_batches, seed):
    pairs = make_alike(number, seed=seed)
    packing = Packing(shards=shards, micro_batches=micro_batches)
    order = {"batch_size": 8, "seed": seed}
    plain = take(packed_batches(pairs, packing, **order), 12)
    packing = dataclasses.replace(packing, apart=True)
    shapes = set()
    for batch, same in zip(take(packed_batches(pairs, packing, **order), 12), plain, strict=True):
        packed = batch.packed_apart
        assert (packed is None) == (batch.packed is None)
        batch = dataclasses.replace(batch, packed_apart=None)  # noqa: PLW2901
        jax.tree.map(np.testing.assert_array_equal, batch, same)
        if packed is None:
            continue
        shapes.add((packed.tokens.shape, packed.scored_tokens.shape))
        real, numbers = 0, packed.row_number.tolist()
        np.testing.assert_array_equal(packed.row, batch.packed.row)
        for place, side in np.ndindex(8, 2):
            whole = pairs.rows[2 * int(batch.record_index[place]) + side].tolist()
            at, last = numbers.index(packed.row[place]), packed.last[place, side]
            mine = np.flatnonzero(packed.segment_ids[at] == packed.segment_ids[at, last])
            assert mine.tolist() == list(range(last + 1 - len(whole), last + 1))
            assert packed.segment_ids[at, last] % 3 == 2
            assert packed.tokens[at, mine].tolist() == whole
            assert packed.positions[at, mine].tolist() == list(range(len(whole)))
            prompt = int(batch.prompt_length[place, side])
            scored = packed.scored_start[place, side] + np.arange(len(whole) - prompt)
            assert packed.scored_tokens[at, scored].tolist() == whole[prompt:]
            where = packed.scored_positions[at, scored]
            np.testing.assert_array_equal(where, mine[prompt - 1 : -1])
            real += len(whole) * (batch.weight[place] > 0)
            assert packed.reach >= len(whole)
        first_copies = (packed.segment_ids > 0).sum() - real  # of rows that hold copies alone
        assert first_copies == 0 or (batch.weight == 0).any()
    assert len(shapes) <= 1


def test_batches_that_do_not_fit_rows_apart_have_the_others_alone(monkeypatch):
    monkeypatch.setattr("jaxalign.data.packing.APART_SLACK", -0.05)
    batches = take(packed_batches(make_alike(53), Packing(apart=True), batch_size=8), 60)
    assert all(batch.packed is not None for batch in batches)
    assert 0 < sum(batch.packed_apart is None for batch in batches) < len(batches)


def test_the_order_is_that_of_the_sizes_and_the_same_for_any_rows():
    orders = []
    for shards, micro_batches in [(1, 1), (2, 1), (1, 4), (2, 2)]:
        packing = Packing(shards=shards, micro_batches=micro_batches)
        batches = take(packed_batches(PAIRS, packing, batch_size=8, epochs=3, seed=1))
        orders.append([sorted(kept(batch)) for batch in batches])
        assert np.bincount(np.concatenate(orders[-1])).tolist() == [3] * 53
    assert all(order == orders[0] for order in orders)


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 400),
    batch_size=st.integers(1, 64),
    shuffle=st.booleans(),
    epochs=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**31),
)
def test_batches_of_equal_size_keep_the_rules_of_all_batches(
    examples, batch_size, shuffle, epochs, seed
):
    sizes = np.random.default_rng(seed).integers(1, 300, (examples, 2))
    how = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle, "epochs": epochs}
    order = batch_order(sizes[:, 0], sizes=sizes, window=16, **how)
    number = order.num_batches or -(-3 * examples // batch_size)
    batches = [order.batch(at) for at in range(number)]
    stream = np.concatenate(batches)
    for epoch in range(epochs or 3):
        once = stream[epoch * examples : (epoch + 1) * examples]
        assert sorted(once.tolist()) == list(range(examples))
    if examples >= batch_size:
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    fresh = batch_order(sizes[:, 0], sizes=sizes, window=16, **how)
    for at in np.random.default_rng(seed).permutation(number)[:5]:  # whatever was asked before
        np.testing.assert_array_equal(fresh.batch(int(at)), batches[at])


def test_examples_that_share_a_batch_with_another_epoch_are_chance():
    """As for all batches: five examples of one size in batches of four."""
    sizes = np.ones((5, 2), int)
    order = batch_order(sizes[:, 0], sizes=sizes, batch_size=4)
    batches = [order.batch(at) for at in range(4000)]
    missing = [(set(range(5)) - set(batch.tolist())).pop() for batch in batches]
    counts = np.bincount(missing, minlength=5)
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


@pytest.mark.parametrize(("batch_size", "rows"), [(8, 1), (32, 1), (32, 4)])
def test_little_is_padding_in_many_epochs_of_real_looking_lengths(batch_size, rows, rng):
    prompts, chosen, rejected = (
        np.exp(rng.normal([4, 4.5, 4.5], [0.9, 0.7, 0.7], (1003, 3))).astype(int).T.clip(1, 500)
    )
    lengths = np.stack([prompts + chosen, prompts + rejected], axis=1).ravel()
    rows_of = make_rows(lengths, np.repeat(prompts, 2))
    for pair in range(1003):
        rows_of[2 * pair + 1][: prompts[pair]] = rows_of[2 * pair][: prompts[pair]]
    rows_of.record_index[:] = np.repeat(np.arange(1003), 2)
    pairs = TokenizedPairs(rows=rows_of)
    packing = Packing(micro_batches=rows)
    packer = packer_of(pairs, packing, batch_size=batch_size, seed=3)
    sizes = packed_sizes(pairs)
    totals = [sizes[packer.order.batch(at)].sum(0) for at in range(4 * 1003 // batch_size)]
    assert packer.room is not None
    computed = packer.room * rows
    assert (np.mean(totals, axis=0) / computed > [0.95, 0.95]).all()
    longest = np.array([packer._rows(packer.order.batch(at))[2] for at in range(len(totals))])[
        :, :-1
    ]
    fits = (longest <= computed / rows).all(1)
    assert fits.mean() > 0.98


def test_a_batch_that_does_not_fit_is_padded(monkeypatch):
    """Rows a little too short, as later epochs may find them."""
    monkeypatch.setattr("jaxalign.data.packing._rounded", lambda size: int(0.992 * size))
    batches = take(packed_batches(PAIRS, Packing(), batch_size=4, epochs=3))
    assert 0 < sum(batch.packed is None for batch in batches) < len(batches)
    assert len({str(jax.tree.map(np.shape, batch)) for batch in batches}) == 2
    stream = np.concatenate([kept(batch) for batch in batches])
    assert np.bincount(stream).tolist() == [3] * 53


@pytest.mark.parametrize("number", [1, 5, 9])
def test_the_state_of_the_iterator_goes_on_exactly_there(number):
    packing = Packing(micro_batches=2)
    whole = take(packed_batches(PAIRS, packing, batch_size=8, seed=3), number + 20)
    batches = packed_batches(PAIRS, packing, batch_size=8, seed=3)
    take(batches, number)
    state = json.loads(json.dumps(batches.get_state()))
    fresh = packed_batches(PAIRS, packing, batch_size=8, seed=3)
    fresh.set_state(state)
    for a, b in zip(take(fresh, 20), whole[number:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(processes):
    packing = Packing(shards=4, apart=True)
    whole = take(packed_batches(PAIRS, packing, batch_size=16, seed=1, epochs=2))
    shares = [
        take(
            packed_batches(
                PAIRS,
                packing,
                batch_size=16,
                seed=1,
                epochs=2,
                process_index=i,
                process_count=processes,
            )
        )
        for i in range(processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_rows_that_cannot_share_a_batch_leave_it_padded():
    batches = take(packed_batches(PAIRS, Packing(micro_batches=3), batch_size=8, epochs=1))
    assert all(batch.packed is None for batch in batches)
    assert sorted(i for batch in batches for i in kept(batch)) == list(range(53))
    with pytest.raises(UserError, match="not a multiple of the 3 processes"):
        packed_batches(PAIRS, Packing(shards=3), batch_size=8, process_count=3)
