"""Reports of run folders written by hand: cells, intervals, plots, and what is refused."""

import json

import pytest
from PIL import Image
from scipy.stats import binomtest

from jaxalign.errors import UserError
from jaxalign.reporting import comparison, read_run, write_report
from jaxalign.reporting.report import _margin
from jaxalign.reporting.runs import half_width


def line(step, split="eval", stage="preference", **metrics):
    return json.dumps({"stage": stage, "split": split, "step": step} | metrics)


@pytest.fixture
def make_run(tmp_path):
    def make(name, *lines, data=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"name": name, "loss": "dpo"}))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        if data is not None:
            (folder / "data.json").write_text(json.dumps(data))
        return folder

    return make


def preference_lines(last):
    first = {"rewards/accuracies": 0.5, "logps/chosen": -40.0, "logps/rejected": -41.5}
    return (
        line(0, **first),
        line(5, split="train", loss=0.6),
        line(10, **{"rewards/accuracies": last, "logps/chosen": -44.25, "logps/rejected": -60.0}),
    )


def test_one_run_is_a_line_per_metric_before_and_after(make_run):
    run = read_run(make_run("a", *preference_lines(0.8)))
    header, rows = comparison([run])
    assert header == ["held-out pairs", "before", "after"]
    assert rows == [
        ["accuracy", "0.500", "0.800"],
        ["chosen log-prob (nats)", "-40.00", "-44.25"],
        ["rejected log-prob (nats)", "-41.50", "-60.00"],
    ]


def test_several_runs_are_columns(make_run):
    runs = [read_run(make_run(n, *preference_lines(v))) for n, v in (("a", 0.8), ("b", 0.6))]
    header, rows = comparison(runs)
    assert header == ["held-out pairs", "a", "b"]
    assert rows[0] == ["accuracy", "0.500 → 0.800", "0.500 → 0.600"]
    assert rows[1] == ["chosen log-prob (nats)", *["-40.00 → -44.25"] * 2]


def watched_lines(cosine, ideal):
    return [
        line(
            step,
            split="train",
            **{
                "entanglement/cosine": cosine,
                "entanglement/ideal": ideal,
                "entanglement/both_down": 1 - ideal,
                "entanglement/c_w": 0.5,
                "entanglement/c_l": 0.6,
                **{f"entanglement/{case}": 0.0 for case in ("both_up", "reversed", "undefined")},
            },
        )
        for step in (1, 2)
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_watched_gradients_have_a_table_and_a_plot(make_run, tmp_path, count):
    runs = [
        read_run(make_run(name, *preference_lines(0.8), *watched_lines(0.25 * (at + 1), 0.75)))
        for at, name in enumerate("ab"[:count])
    ]
    text = write_report(runs, tmp_path / "out").read_text()
    cells = " | ".join(["0.250", "0.500"][:count])
    assert f"| cosine of the two gradients | {cells} |" in text
    assert "| both down | 25.0%" in text
    with Image.open(tmp_path / "out" / "entanglement.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize("count", [1, 2])
def test_groups_have_a_table_and_a_plot(make_run, tmp_path, count):
    metrics = {"positive": 0.25, "displaced": 0.5, "positive/from_negative": -2.0}
    metrics = {f"entanglement/{name}": value for name, value in metrics.items()}
    lines = [line(step, "train", "online", loss=1.0, **metrics) for step in (1, 2)]
    runs = [read_run(make_run(name, *lines)) for name in "ab"[:count]]
    text = write_report(runs, tmp_path / "out").read_text()
    cells = " | ".join(["50.0%", "50.0%"][:count])
    assert f"| reinforced, but to fall (displaced) | {cells} |" in text
    assert "| reinforced: from suppressed ones | -2 " in text
    with Image.open(tmp_path / "out" / "groups.png") as image:
        assert image.width > 600


def test_runs_of_different_losses_are_compared_in_nats(make_run):
    run = read_run(make_run("a", *preference_lines(0.8)))
    # gaps of 1.5 at the start and 15.75 at the end
    assert _margin(run, own_units=False) == ([0, 10], [0.0, 14.25])


def test_shares_have_the_interval_of_their_number_of_pairs(make_run):
    run = read_run(make_run("a", *preference_lines(0.8), data={"held_out_pairs": {"records": 100}}))
    # 1.96 sqrt(0.5 * 0.5 / 100) and 1.96 sqrt(0.8 * 0.2 / 100)
    assert comparison([run])[1][0] == ["accuracy", "0.500 ± 0.098", "0.800 ± 0.078"]


def test_an_interval_at_zero_or_one_is_not_empty():
    """Wilson's bounds, from scipy: 0 of 8 says no more than that the fraction is below 0.324."""
    for wins in (0, 8):
        bounds = binomtest(wins, 8).proportion_ci(method="wilson")
        assert half_width(wins / 8, 8) == pytest.approx(bounds.high - bounds.low, rel=1e-4)
    assert half_width(0.5, 64) == pytest.approx(0.1225)


def test_the_report_has_tables_and_plots(make_run, tmp_path):
    data = {
        "data": {
            "source": "pairs.jsonl",
            "read": 1200,
            "skipped": {"empty response": 2},
            "first": {"empty response": "pairs.jsonl:7"},
        },
        "train_pairs": {"records": 1198, "straddling": 0},
    }
    folder = make_run("a", *preference_lines(0.8), data=data)
    path = write_report([read_run(folder)], tmp_path / "new" / "report")
    text = path.read_text()
    assert "| accuracy | 0.500 | 0.800 |" in text
    assert "1,200 read; 2 skipped for empty response (first: pairs.jsonl:7)" in text
    assert "1,198 records |" in text
    assert "straddling" not in text
    for name in ("preference.png", "loss.png"):
        assert f"]({name})" in text
        with Image.open(path.parent / name) as image:
            assert min(image.size) > 300
            assert len(set(image.convert("L").get_flattened_data())) > 10  # not an empty canvas


def test_a_run_without_preferences_has_its_losses_alone(make_run, tmp_path):
    folder = make_run(
        "text", line(0, stage="pretrain", loss=5.0), line(1, "train", "pretrain", loss=4.0)
    )
    assert comparison([read_run(folder)])[1] == []
    text = write_report([read_run(folder)], tmp_path / "report").read_text()
    assert "preference.png" not in text
    assert "loss.png" in text


def test_a_line_cut_short_by_a_kill_is_left_out(make_run):
    folder = make_run("a", *preference_lines(0.8))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "preference", "split": "ev')
    assert len(read_run(folder).lines) == 3


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json; name a folder made by jaxalign train"):
        read_run(tmp_path)
