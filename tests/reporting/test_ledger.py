"""The ledger of a run written by hand: sums by part, and the tokens that moved most."""

import json

import pytest
from PIL import Image

from jaxalign.reporting import read_run, write_report
from jaxalign.reporting.ledger import charts, has_ledger, table, token_chart


def metrics(step, own, before=""):
    parts = {"others": -1.0, "optimiser": 0.5, "curvature": -0.25}
    parts |= {} if before else {"own": own}
    parts["realised"] = sum(parts.values())
    named = {f"{part}_{side}": x for part, x in parts.items() for side in ("chosen", "rejected")}
    return {f"entanglement/ledger/{before}{name}": value for name, value in named.items()}


def token(text, gradient, count=1):
    return {
        "token": text,
        "count": count,
        "gradient": gradient,
        "optimiser": 0.5,
        "curvature": -0.25,
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": "a"}))
    lines = [
        {"stage": "preference", "split": "train", "step": step}
        | metrics(step, 2.0 * step)
        | metrics(step, 0.0, "held_out/")
        for step in (1, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    entries = [
        {
            "step": step,
            "pairs_of": name,
            "pairs": [],
            "tokens": {
                "chosen": [token("Ġup", 2.0, 3), token("$$", 1.0 + step)],
                "rejected": [token("Ġdown", -4.0)],
            },
        }
        for step in (1, 3)
        for name in ("batch", "held_out")
    ]
    text = "".join(json.dumps(x) + "\n" for x in entries)
    (folder / "ledger.jsonl").write_text(text + '{"step": 5, "pai')  # a killed process
    return read_run(folder)


def test_the_table_has_the_sum_of_each_part(run):
    assert has_ledger(run)
    header, rows = table(run)
    assert header[0] == "sum over 2 steps"
    assert header[1:3] == ["chosen, pairs of the batch", "rejected, pairs of the batch"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["own gradients"] == ["+8.00", "+8.00", "", ""]
    assert cells["other pairs"] == ["-2.00"] * 4
    assert cells["together"] == ["+6.50", "+6.50", "-1.50", "-1.50"]


def test_the_charts_have_running_sums_and_sums_of_tokens(run):
    chosen, _, tokens, fallen = charts(run, "batch")
    lines = {one.label: list(one.y) for one in chosen.series}
    assert lines["own gradients"] == [2.0, 8.0]
    assert lines["together"] == [1.25, 6.5]
    assert tokens.x_names == ["$$ ×2", "·up ×6"]  # 2 + 4 + 2 * 0.25 is more than 2 * 2.25
    assert [list(one.y) for one in tokens.series] == [[6.5, 4.5], []]
    assert [list(one.y) for one in fallen.series] == [[], [-7.5]]
    assert "own gradients" not in {one.label for one in charts(run, "held_out")[0].series}


def test_the_report_shows_them(run, tmp_path):
    text = write_report([run], tmp_path / "out").read_text()
    assert "| together | +6.50 | +6.50 | -1.50 | -1.50 |" in text
    for name in ("ledger_batch_a.png", "ledger_held_out_a.png"):
        assert f"]({name})" in text
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width > 1000


def test_a_run_without_a_file_has_its_sums_alone(run):
    (run.folder / "ledger.jsonl").unlink()
    assert len(charts(run, "batch")) == 2


def test_only_the_largest_tokens_are_shown():
    chart = token_chart([token(f"t{n}", float(n)) for n in range(20)], "tokens")
    assert len(chart.x_names) == 8
    assert chart.x_names[0].startswith("t19")
