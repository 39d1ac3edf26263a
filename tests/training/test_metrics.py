"""Means add up exactly; the metrics file can be cut back to a checkpoint."""

import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import OutputError, UserError
from jaxalign.training.metrics import (
    JsonLines,
    TensorBoard,
    mean_of,
    parse_metrics,
    read_metrics,
    rewind,
)


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


def written(path, steps=4):
    writer = JsonLines(path)
    for step in range(1, steps + 1):
        writer.write("sft", "train", step, {"loss": step / 2})
    writer.close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b"\n", "not JSON"),
        (b"\x00\xff\xfe junk\n", "not JSON"),
        (b'{"stage": "sft", "split": "tr\n', "not JSON"),
        (b"[" * 5000 + b"\n", "not JSON"),
        (b"[1, 2]\n", "a list, not an object"),
        (b"3\n", "a int, not an object"),
        (b"null\n", "a NoneType, not an object"),
        (b'{"split": "train", "step": 2}\n', "no stage"),
        (b'{"stage": "sft", "step": 2}\n', "no split"),
        (b'{"stage": "sft", "split": "train"}\n', "no step"),
        (b'{"stage": "sft", "split": "train", "step": "2"}\n', "step is '2'"),
        (b'{"stage": "sft", "split": "train", "step": true}\n', "step is True"),
        (b'{"stage": "sft", "split": "train", "step": 2, "loss": "a"}\n', "loss is not a number"),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_bad_line_is_named_and_nothing_is_lost(tmp_path, at, bad, fault):
    path = tmp_path / "metrics.jsonl"
    lines = written(path)
    content = b"".join([*lines[:at], bad, *lines[at:]])
    path.write_bytes(content)
    with pytest.raises(UserError) as found:
        rewind(path, {"sft": 3})
    assert str(found.value).startswith(f"{path}:{at + 1}: {fault}; ")
    assert path.read_bytes() == content
    kept, skipped = parse_metrics(path)
    assert [line["step"] for line in kept] == [1, 2, 3, 4]
    assert skipped == [f"{path}:{at + 1}: {fault}"]


def test_only_a_torn_last_line_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = written(path)
    for torn in (lines[3][:-9], b"\x00\x00\x00"):
        path.write_bytes(b"".join(lines[:3]) + torn)
        rewind(path, {"sft": 3})
        assert path.read_bytes() == b"".join(lines[:3])
    path.write_bytes(b"".join(lines)[:-1])  # all but the line's end was written
    rewind(path, {"sft": 4})
    assert path.read_bytes() == b"".join(lines)


def test_a_missing_file_beside_checkpoints_is_refused(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    rewind(path, {})
    with pytest.raises(UserError, match=r"metrics\.jsonl: missing.*checkpoints of sft"):
        rewind(path, {"sft": 2})
    path.touch()
    rewind(path, {"sft": 2})
    assert f"{path}: lacks sft steps 1 to 2" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_names_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    writer = JsonLines(path)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be written: No space left"):
        writer.write("sft", "train", 1, {"loss": 1.0})


def shown(folder):
    """(tag, step) of the points that TensorBoard shows: a session's start purges what is after."""
    from tensorboardX.proto.event_pb2 import Event

    points = []
    for file in sorted(folder.iterdir()):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack("<Q", raw[at : at + 8])
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == 1:
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step) for value in event.summary.value]
    return points


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    for keep, steps in (({}, range(6)), ({"sft": 3, "online": 9}, range(4, 8)), ({}, range(2))):
        writer = TensorBoard(tmp_path, keep)
        for step in steps:
            writer.write("sft", "train", step, {"loss": 1.0, "kl": 2.0})
        writer.flush()
        writer.close()
        expected = range(8) if 7 in steps else steps
        tags = ("sft-train/loss", "sft-train/kl")
        assert shown(tmp_path / "sft") == [(tag, step) for step in expected for tag in tags]
