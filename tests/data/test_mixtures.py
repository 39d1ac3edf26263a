"""Sources with weights: parsing, and which records each epoch has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.mixtures import BySource, Mixture, Part, weighted_sources
from jaxalign.data.order import BatchOrder
from jaxalign.errors import UserError, notice_once


def order_of(mixture, *, lengths, batch_size, seed, **how):
    options = {"shuffle": True, "window": 16, "epochs": None, "drop_remainder": False}
    return BatchOrder(
        lengths=lengths, mixture=mixture, batch_size=batch_size, seed=seed, **options | how
    )


@pytest.mark.parametrize(
    ("text", "source", "weight", "label"),
    [
        ("polite.jsonl", "polite.jsonl", 1.0, "polite"),
        ("data/polite.jsonl.gz:0.5", "data/polite.jsonl.gz", 0.5, "polite"),
        ("data/polite.jsonl:2#train[:90%]", "data/polite.jsonl#train[:90%]", 2.0, "polite"),
        ("tfds:hh_rlhf:.25#test", "tfds:hh_rlhf#test", 0.25, "hh_rlhf"),
        ("tfds:hh_rlhf@/data", "tfds:hh_rlhf@/data", 1.0, "hh_rlhf"),
        ("polite.jsonl:1e-3", "polite.jsonl", 0.001, "polite"),
        ("trl-lib/ultrafeedback:3", "trl-lib/ultrafeedback", 3.0, "ultrafeedback"),
        ("embedded", "embedded", 1.0, "embedded"),
    ],
)
def test_a_source_may_have_a_weight(text, source, weight, label):
    (one,) = weighted_sources([text])
    assert (one.source, one.weight, one.label) == (source, weight, label)


def test_a_file_whose_name_ends_like_a_weight_is_a_file(tmp_path):
    file = tmp_path / "pairs:2"
    file.write_text("{}")
    (one,) = weighted_sources([str(file)])
    assert (one.source, one.weight) == (str(file), 1.0)


def test_labels_are_different():
    sources = weighted_sources(["a/x.jsonl", "b/x.jsonl:2", "x"])
    assert [one.label for one in sources] == ["x", "x-2", "x-3"]


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "0.0", "half", ""])
def test_what_follows_a_file_is_a_weight(tmp_path, weight):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    with pytest.raises(UserError, match=f"data: .*a.jsonl:{weight}: a weight is a positive number"):
        weighted_sources([f"{file}:{weight}"])


def test_a_folder_named_tfds_has_no_weight(tmp_path, monkeypatch):
    (tmp_path / "tfds").mkdir()
    monkeypatch.chdir(tmp_path)
    assert weighted_sources(["tfds:hh_rlhf"])[0].source == "tfds:hh_rlhf"


def test_a_weight_of_the_only_source_is_noticed(capsys):
    notice_once.cache_clear()
    for sources in (["a.jsonl:2", "b.jsonl"], ["a.jsonl:1"], ["a.jsonl:0.5"], ["a.jsonl:0.5"]):
        weighted_sources(sources)
    said = "jaxalign: a.jsonl:0.5: the weight has no effect: there is no other source\n"
    assert capsys.readouterr().err == said


def test_a_weight_is_positive():
    with pytest.raises(UserError, match=r"sft_data: a.jsonl:0: a weight is a positive number"):
        weighted_sources(["a.jsonl:0"], "sft_data")
    with pytest.raises(UserError, match="data: no source"):
        weighted_sources(())


def test_shares_by_weights_and_by_temperature():
    source = np.repeat([0, 1], [1000, 10])
    sizes = {
        T: Mixture(source=source, weights=(1.0, 1.0), temperature=T).sizes for T in (1.0, 2.0, 1e9)
    }
    assert sizes[1.0] == ((1000, 1000), (10, 10))
    assert sizes[2.0] == ((1000, 100), (10, 10))  # sqrt(1000) : sqrt(10) = 100 : 10
    assert sizes[1e9] == ((1000, 10), (10, 10))
    assert Mixture(source=source, weights=(0.3, 0.9)).sizes == ((1000, 333), (10, 10))
    assert Mixture(source=source, weights=(1e-6, 1.0)).sizes == ((1000, 1), (10, 10))
    # a source none of whose records could be tokenised
    assert Mixture(source=np.zeros(4, int), weights=(1.0, 5.0)).sizes == ((4, 4), (0, 0))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_records_are_used_as_often_as_their_weights_say(counts, weights, seed):
    source = np.repeat(np.arange(len(counts)), counts)
    mixture = Mixture(source=source, weights=tuple(weights[: len(counts)]))
    epochs = [mixture.epoch(at, seed) for at in range(max(counts))]
    for members in epochs:
        assert len(members) == mixture.examples == len(set(members.tolist()))
        used = np.bincount(source[members], minlength=len(counts))
        assert used.tolist() == [used for _, used in mixture.sizes]
    for at, (examples, used) in enumerate(mixture.sizes):  # after n epochs, all m times
        first = sum(counts[:at])
        seen = np.concatenate(epochs[:examples])
        times = np.bincount(seen, minlength=len(source))[first : first + examples]
        assert times.tolist() == [used] * examples


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 200), min_size=2, max_size=3),
    weights=st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    batch_size=st.integers(1, 40),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_batches_of_a_mixture_hold_each_epoch_once_and_nothing_twice(
    counts, weights, batch_size, packed, seed
):
    source = np.repeat(np.arange(len(counts)), counts)
    mixture = Mixture(source=source, weights=tuple(weights[: len(counts)]))
    lengths = np.random.default_rng(seed).integers(1, 300, len(source))
    how = {"lengths": lengths, "batch_size": batch_size, "seed": seed}
    how["sizes"] = np.stack([lengths, lengths], 1) if packed else None
    order = order_of(mixture, **how)
    number = -(-3 * mixture.examples // batch_size)
    batches = [order.batch(at) for at in range(number)]
    stream = np.concatenate(batches)
    for epoch in range(3):
        part = slice(epoch * mixture.examples, (epoch + 1) * mixture.examples)
        assert sorted(stream[part].tolist()) == mixture.epoch(epoch, seed).tolist()
    if mixture.examples >= batch_size:
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    fresh = order_of(mixture, **how)
    for at in np.random.default_rng(seed).permutation(number)[:5]:  # whatever was asked before
        np.testing.assert_array_equal(fresh.batch(int(at)), batches[at])


def test_equal_weights_are_the_order_without_a_mixture():
    lengths = np.random.default_rng(0).integers(1, 300, 150)
    mixture = Mixture(source=np.repeat([0, 1], [100, 50]), weights=(2.0, 2.0))
    how = {"lengths": lengths, "batch_size": 8, "seed": 1}
    with_it, without = order_of(mixture, **how), order_of(None, **how)
    for at in range(60):
        np.testing.assert_array_equal(with_it.batch(at), without.batch(at))


def test_a_part_has_its_examples_alone():
    records = BySource(labels=("a", "b"), source=np.array([0, 0, 1, 1, 1]))
    ours, theirs = records.members(np.array([0, 2, 3, 4]))  # record 1 was skipped
    assert (ours.tolist(), theirs.tolist()) == ([0], [1, 2, 3])
    assert [records.label(at) for at in range(5)] == ["a", "a", "b", "b", "b"]
    how = {"epochs": 1, "shuffle": False, "seed": 0, "batch_size": 2}
    order = order_of(Part(members=theirs), lengths=np.ones(4, int), **how)
    assert [order.batch(at).tolist() for at in range(order.num_batches)] == [[1, 2], [3]]
