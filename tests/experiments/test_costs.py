import json

import pytest

from experiments import costs


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"cpu_seconds": 60.0, "seconds": 5.0}, 60.0),
        ({"training_cpu_seconds": 40.0, "server_cpu_seconds": 2.0, "seconds": 5.0}, 42.0),
        ({"seconds": 5.0}, 5.0),
        ({"minutes": 2.0}, 120.0),
        ({"seconds_per_update": 3.0, "updates": 4}, 12.0),
        ({"answers": []}, 0.0),
    ],
)
def test_seconds_are_those_of_the_processor_where_they_were_measured(row, expected):
    assert costs.seconds(row) == expected


def test_runs_of_one_time_advance_together_and_rows_without_a_cost_are_no_runs(tmp_path):
    rows = tmp_path / "rows" / "part"
    rows.mkdir(parents=True)
    one = {"cpu_seconds": 60, "trained_tokens": 7, "peak_memory": 2e9}
    (rows / "one.json").write_text(json.dumps(one))
    (rows / "none.json").write_text(json.dumps({"answers": []}))
    lines = [json.dumps({"seconds_per_update": 30, "updates": 2})] * 3
    lines.append(json.dumps({"seconds_per_update": 10, "updates": 3}))  # tried later, alone
    (rows / "question_server_short.json").write_text(json.dumps({"seconds": 9}))
    (tmp_path / "rows" / "together.jsonl").write_text("\n".join(lines))
    assert costs.costs(tmp_path) == costs.Cost(runs=5, tokens=7, minutes=2.5, gigabytes=2.0)
    assert costs.costs(tmp_path / "rows" / "nowhere") is None
