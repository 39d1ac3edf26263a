"""The benchmark's arithmetic, and the inputs that make its contestants comparable."""

import json
import math

import pytest

from benchmarks import dpo_step, inputs, machine
from benchmarks.peers.recorder import fingerprint
from jaxalign.data import load_tokenizer, preference_records, tokenize_pairs

LOG_2 = math.log(2)


def recorded(*, tokens="a", log_probs=(-10.0, -11.0), losses=(LOG_2, LOG_2 - 0.1), seconds=1.0):
    return {
        "tokens": tokens,
        "log_probs": list(log_probs),
        "losses": list(losses),
        "seconds": [9.0, seconds, seconds],
        "cpu_seconds": [9.0, 2.0, 2.0],
        "peak_bytes": [100, 200, 300],
        "first_step": 5.0,
    }


def test_a_row_of_the_inputs_is_exactly_length_tokens_of_our_trainer(tmp_path):
    model, file = tmp_path / "model", tmp_path / "pairs.jsonl"
    shape = dpo_step.asdict(inputs.SHAPES["1M"])
    inputs.write(shape, 32, 3, 12, str(model), str(file))
    pairs, _ = tokenize_pairs(preference_records(str(file)), load_tokenizer(model), max_length=32)
    assert pairs.length.tolist() == [[32, 32]] * 3
    assert pairs.prompt_length.tolist() == [[12, 12]] * 3
    first = json.loads(file.read_text().splitlines()[0])
    named = [int(word[1:]) for word in (first["prompt"] + first["chosen"]).split()]
    assert pairs.rows[0].tolist() == [*named, inputs.END]


def test_fingerprint_knows_tokens_but_no_order_of_rows():
    assert fingerprint([[1, 2], [3, 4]]) == fingerprint([[3, 4], [1, 2]])
    assert fingerprint([[1, 2], [3, 4]]) != fingerprint([[2, 1], [3, 4]])


def test_ratios_are_taken_within_rounds():
    assert machine.round_ratio([2.0, 40.0, 3.0], [1.0, 10.0, None]) == 3.0
    assert machine.round_ratio([None], [1.0]) is None


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "same"),
        ({"tokens": "b"}, "NO: other tokens"),
        ({"log_probs": (-10.0, -11.001)}, "NO: log-probs"),
        ({"losses": (LOG_2, LOG_2 - 0.09)}, "NO: fall of the loss"),
        ({"losses": (LOG_2,)}, "NO: 1 steps"),
    ],
)
def test_a_contestant_that_computed_something_else_is_marked(changed, verdict):
    assert dpo_step.same(recorded(**changed), [recorded()], "float32").startswith(verdict)


def test_summary_and_goals_of_known_numbers():
    options = dpo_step.Options(peers=("trl",), pairs=1, length=50, skip=1, steps=3, rounds=2)
    rows = dpo_step.contestants(options)
    runs = {row.name: [recorded(), recorded()] for row in rows}
    runs["trl"] = [recorded(seconds=8.0), recorded(seconds=2.0)]
    runs["trl, checkpointing"] = [None, None]
    report = dpo_step.summary(options, rows, runs, None)
    assert report["jaxalign"]["tokens_per_second"] == 100
    assert report["jaxalign"]["times"]["trl"] == 5.0
    assert report["jaxalign"]["memory"]["trl"] == 1.0
    assert report["trl, checkpointing"] == {"same": "failed"}
    lines = dpo_step.goals(report)
    assert lines[0] == "jaxalign: tokens/s 5.00 of trl's, at least 4.0: met"
    assert lines[1] == "jaxalign: peak memory 1.00 of trl's, at most 0.25: NOT met"


def test_a_shape_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(dpo_step, "gpu", lambda: None)
    monkeypatch.setattr(dpo_step, "memory", lambda kind: 2**34)
    dpo_step.refuse_if_too_large(dpo_step.Options(size="15M"))
    with pytest.raises(SystemExit, match="GiB for the largest contestant"):
        dpo_step.refuse_if_too_large(dpo_step.Options(size="1B"))
