"""Means add up exactly; the metrics file can be cut back to a checkpoint."""

import json

import jax.numpy as jnp
import numpy as np

from jaxalign.training.metrics import JsonLines, mean_of, read_metrics, rewind


def test_mean_of_parts_is_the_mean_of_the_whole(rng):
    values, weights = jnp.asarray(rng.normal(size=9)), jnp.asarray(rng.integers(1, 4, size=9) * 1.0)
    parts = mean_of(values[:2], weights[:2]) + mean_of(values[2:], weights[2:])
    np.testing.assert_allclose(parts.value(), np.average(values, weights=weights), rtol=1e-6)


def test_entries_of_weight_zero_may_be_nan():
    mean = mean_of(jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0]))
    assert float(mean.value()) == 1.0


def test_metrics_file_is_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    for step in range(1, 5):
        writer.write("sft", "train", step, {"loss": step / 2})
    for step in range(1, 5):
        writer.write("preference", "train", step, {"loss": float("nan")})
    writer.close()
    with path.open("a") as file:
        file.write('{"stage": "preference", "st')
    rewind(path, {"sft": 4, "preference": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        *[("sft", i) for i in range(1, 5)],
        ("preference", 1),
        ("preference", 2),
    ]
    assert lines[-1]["loss"] is None
    assert read_metrics(path) == lines


def test_a_flushed_file_holds_its_lines_and_takes_more(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write("preference", "train", 1, {"loss": 0.5})
    descriptor = writer._file
    writer.flush()
    assert descriptor.closed  # what a mounted bucket waits for
    writer.write("preference", "train", 2, {"loss": 0.25})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
