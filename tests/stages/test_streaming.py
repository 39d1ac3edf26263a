"""What a run trains on does not depend on where its records and tokens are kept."""

import json
import mmap
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.config import (
    FeedbackConfig,
    PreferenceConfig,
    PretrainingConfig,
    SupervisedConfig,
    TrainConfig,
    with_fields,
)
from jaxalign.data import embedded_tokenizer, record_index, token_store
from jaxalign.models import DecoderConfig
from jaxalign.runs.inputs import example_digests
from jaxalign.stages import kinds_of, streaming
from jaxalign.stages.inputs import Inputs
from jaxalign.stages.streaming import streams

SHAPE = DecoderConfig(
    vocab_size=512, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8,
    context_length=64,
)  # fmt: skip
ONCE = {"steps": 4, "batch_size": 4}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setattr(record_index, "BYTES", 700)
    monkeypatch.setattr(token_store, "RECORDS", 11)
    monkeypatch.setattr("jaxalign.data.workers.MOST", 1)
    paths = []
    for name, number in (("first", 60), ("second", 30)):
        rows = [
            {"prompt": f"{name} {n}", "chosen": f"{n} it is " * (1 + n % 4), "rejected": "no"}
            for n in range(number)
        ]
        rows = [row | {"text": f"{row['prompt']}: {row['chosen']}"} for row in rows]
        paths.append(tmp_path / f"{name}.jsonl")
        lines = [*map(json.dumps, rows[:9]), "{", *map(json.dumps, rows[9:])]
        paths[-1].write_text("\n".join(lines))
    return tuple(map(str, paths))


def loaded(tmp_path, mode, sources, **fields):
    """The config of a run of all stages that can be streamed, its data and its report."""
    first, second = sources
    config = TrainConfig(
        output=str(tmp_path / "runs"),
        data=(f"{first}:0.5", second),
        max_length=64,
        holdout=0.25,
        bad_records="skip",
        max_records=40,
        max_eval_records=6,
        seed=2,
        streaming=mode,
        pretrain=PretrainingConfig(text=sources, eval_text=(second,), **ONCE),
        sft=SupervisedConfig(**ONCE),
        preference=PreferenceConfig(**ONCE),
        feedback=FeedbackConfig(**ONCE),
    )
    config = with_fields(config, **fields)
    folder = tmp_path / mode
    folder.mkdir(exist_ok=True)
    inputs = Inputs(config, embedded_tokenizer(), folder, SHAPE, (0, 1))
    data = {kind.name: kind.load(config, inputs) for kind in kinds_of(config)}
    return config, data, inputs.report


@pytest.mark.parametrize(
    "changes", [{}, {"loss": "preference_model", "feedback": FeedbackConfig()}]
)
def test_data_and_batches_are_the_same_on_disk_as_in_memory(tmp_path, sources, capsys, changes):
    config, memory, counts = loaded(tmp_path, "never", sources, **changes)
    assert not (tmp_path / "runs" / ".cache").exists()
    assert "stay on disk" not in capsys.readouterr().out
    _, disk, counted = loaded(tmp_path, "always", sources, **changes)
    said = capsys.readouterr().out
    assert f"data first: 60 records of {sources[0]} stay on disk, indexed in " in said
    assert f" tokens of {counts['train_pairs']['records']} records stay on disk" in said
    assert example_digests(disk) == example_digests(memory)
    assert counted == counts
    for name, one in memory.items():
        assert [_is_mapped(disk[name]), _is_mapped(one)] == [True, False]
        assert list(disk[name].sources) == list(one.sources)
        assert disk[name].examples(2) == one.examples(2)
        streamed, plain = (x.batches(4, seed=config.seed) for x in (disk[name], one))
        for _ in range(20):
            _assert_equal(next(streamed), next(plain))
        _assert_equal(disk[name].evaluation(4), one.evaluation(4))
        batch = next(disk[name].batches(4, seed=0))
        assert disk[name].describe(batch) == one.describe(batch)
    again = loaded(tmp_path, "always", sources, **changes)[1]
    assert example_digests(again) == example_digests(memory)


def _is_mapped(data):
    flat = getattr(data.train, "rows", data.train).flat
    return isinstance(flat.base, np.memmap | mmap.mmap)


def _assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_large_files_are_streamed(sources, monkeypatch):
    config, never = TrainConfig(), TrainConfig(streaming="never")
    assert not streams(config, sources)
    monkeypatch.setattr(streaming, "LARGE", sum(Path(path).stat().st_size for path in sources))
    assert not streams(config, sources[1:])
    assert streams(config, sources)
    assert not streams(never, sources)
    assert not streams(TrainConfig(streaming="always"), ["embedded", *sources])
    assert not streams(config, ["tfds:none", "nobody/nothing"])
