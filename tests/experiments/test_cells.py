"""Cells shared by processes, and short runs beside `jaxalign train`."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import cells
from experiments.cells import Cell
from experiments.gradient_entanglement import small as entanglement
from experiments.offline import small as offline
from experiments.rows import Rows
from experiments.short_runs import Bench, Options, with_peak, write_splits
from jaxalign.errors import UserError
from jaxalign.reporting import read_run
from jaxalign.runs.train import train
from jaxalign.training.optimizers import make_optimizer, make_schedule
from tests.tiny_model import save_tiny_model


def options_in(folder: Path, **more) -> Options:
    return Options(model="none", output=folder / "out", rows=folder / "rows", **more)


def writing(name: str, study: str = "a", **more) -> Cell:
    def run(bench: Bench) -> None:
        bench.rows(study).write(name, {"order": len(list(bench.options.rows.rglob("*.json")))})

    return Cell(study=study, name=name, run=run, **more)


def failing(bench: Bench) -> None:
    raise ValueError("no")


def test_cells_run_in_order_once_after_what_they_need_and_a_fault_stops_only_its_own(tmp_path):
    bench = Bench(options_in(tmp_path))
    bad = Cell(study="a", name="bad", run=failing)
    waiting = writing("waits", after="second")
    never = writing("never", after="bad")
    todo = [waiting, writing("first"), bad, never, writing("second")]
    cells.work(todo, bench)
    rows = Rows(folder=tmp_path / "rows" / "a")
    assert rows.names() == ["first", "second", "waits"]
    assert [rows[name]["order"] for name in ("first", "second", "waits")] == [0, 1, 2]
    assert "ValueError: no" in (tmp_path / "out/cells/a_bad.failed").read_text()
    cells.work(todo, bench)
    assert rows["first"]["order"] == 0


def test_a_cell_of_another_process_is_left_to_it_and_one_that_ended_is_not_tried_again(tmp_path):
    bench = Bench(options_in(tmp_path), until=time.time() + cells.LEAST + 0.5)
    one = writing("one")
    with cells.claimed(tmp_path / "out/cells/a_one.lock") as mine:
        assert mine
        cells.work([one], bench)
    assert not one.done(tmp_path / "rows")
    (tmp_path / "out/cells/a_one.begun").touch()
    cells.work([one], Bench(options_in(tmp_path)))
    assert not one.done(tmp_path / "rows")
    assert "ended" in (tmp_path / "out/cells/a_one.failed").read_text()


def test_a_second_command_leaves_the_cells_of_one_that_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "write_splits", lambda options: None)
    options, folder = options_in(tmp_path), tmp_path / "out/cells"
    folder.mkdir(parents=True)
    for name in ("running", "gone"):
        (folder / f"a_{name}.begun").touch()
    with cells.claimed(folder / "a_running.lock"):
        assert cells.run([writing("new")], options, "none") == 0
        assert [path.stem for path in folder.glob("*.begun")] == ["a_running"]


def test_flags_give_the_same_options(tmp_path):
    options = options_in(tmp_path, minutes=2.5, cells=("a", "b/c"), workers=3)
    assert tyro.cli(Options, args=cells.arguments_of(options)) == options


def test_rows_of_other_sizes_are_not_resumed(tmp_path):
    options = options_in(tmp_path, steps=3)
    cells.check_same(options)
    cells.check_same(dataclasses.replace(options, workers=2, minutes=1.0))
    with pytest.raises(UserError, match="another steps"):
        cells.check_same(dataclasses.replace(options, steps=4))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_peak_in_the_state_is_the_learning_rate(name, rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}

    def after(rule):
        state, now = rule.init(params), params
        for step in range(3):
            gradient = jax.tree.map(lambda x, step=step: jnp.cos(x + step), now)
            updates, state = rule.update(gradient, state, now)
            now = jax.tree.map(jnp.add, now, updates)
        return now["kernel"]

    def made(peak):
        schedule = make_schedule(learning_rate=peak, steps=3, schedule="linear", warmup_steps=1)
        return make_optimizer(name, schedule)

    np.testing.assert_allclose(
        after(with_peak(0.02, made(1.0))), after(made(0.02)), rtol=1e-5, atol=1e-7
    )


def row_of(rate, seed, *, sweep=0.5, curves=None):
    held_out = {
        f"by_source/{source}_sweep/rewards/accuracies": {"step": [0, 4], "value": [0.5, sweep]}
        for source in offline.SOURCES
    }
    held_out |= {name: {"step": [0, 2, 4], "value": list(x)} for name, x in (curves or {}).items()}
    return {"cell": "dpo", "learning_rate": rate, "seed": seed, "held_out": held_out}


def test_a_loss_goes_on_with_the_rate_of_the_best_first_seed_and_the_lower_of_equal_ones(tmp_path):
    rows = Rows(folder=tmp_path)
    for rate, seed, sweep in ((1e-6, 0, 0.6), (1e-5, 0, 0.7), (1e-4, 0, 0.7), (1e-4, 1, 0.9)):
        rows.write(offline.row_name("dpo", rate, seed), row_of(rate, seed, sweep=sweep))
    rows.write("dpo_sft_2e-06_0", row_of(2e-6, 0, sweep=1.0) | {"cell": "dpo_sft"})
    assert offline.best_rate(rows, "dpo") == 1e-5
    assert [row["seed"] for row in offline.seeds_of(rows, "dpo")] == [0]
    assert offline.seeds_of(rows, "kto") == []


def test_runs_are_compared_where_they_first_reach_an_accuracy():
    curves = {
        "rewards/accuracies": (0.5, 0.7, 0.9),
        "logps/chosen": (-20.0, -21.0, -24.0),
        "logps/rejected": (-30.0, -33.0, -41.0),
    }
    row = row_of(1e-5, 0, curves=curves)
    at = entanglement.at_accuracy(row, 0.8)
    assert at == pytest.approx({"step": 3.0, "chosen": -2.5, "rejected": -7.0})
    assert entanglement.at_accuracy(row, 0.95) is None
    assert entanglement.outcome(row) == "both down"


@pytest.mark.slow
def test_a_short_run_is_a_run_of_train(tmp_path):
    save_tiny_model(tmp_path / "model")
    names = ("red", "blue", "green", "black", "white", "grey", "pink", "gold")
    lines = [
        json.dumps({"prompt": f"say {x} {n}", "chosen": f"yes {x}", "rejected": f"no {n} {x}"})
        for x in names
        for n in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    pairs = str(tmp_path / "pairs.jsonl")
    given = {"polite": pairs, "ultrafeedback": (pairs,), "steps": 3, "held_out": 16}
    given |= {"max_length": 32}
    options = dataclasses.replace(
        options_in(tmp_path, **given), model=str(tmp_path / "model"), dtype="float32"
    )
    write_splits(options)
    bench = Bench(options)
    config = offline.preferences(bench, "dpo", 1e-3, 0)
    padded = dataclasses.replace(config.preference, packing="never", share_prompts="never")
    config = dataclasses.replace(config, preference=padded, output=str(tmp_path / "runs"))
    start = bench.model(options.model)
    for rate in (1e-2, 1e-3):  # the second is the compiled program of the first
        rule = dataclasses.replace(config.preference.optimizer, learning_rate=rate)
        stage = dataclasses.replace(config.preference, optimizer=rule)
        one = dataclasses.replace(config, preference=stage)
        finished = bench.run(start, one, "preference", buckets=4)
    row = finished.row(config, "preference")
    run = read_run(train(config))
    for source in ("polite_test", "ultrafeedback_sweep"):
        for metric in ("logps/chosen", "logps/rejected", "kl"):
            name = f"by_source/{source}/{metric}"
            expected = run.curve("preference", "eval", name)
            found = row["held_out"][name]
            assert found["step"] == expected[0] == [0, 3]
            np.testing.assert_allclose(found["value"], expected[1], rtol=1e-4, atol=1e-7)


def test_the_judge_s_verdicts_are_shown_and_answers_without_one_are_left_out(tmp_path):
    rows = Rows(folder=tmp_path)
    rows.write("judged_dpo", {"preference": [0.6, None, 0.4]})
    assert offline.judged(rows, "dpo") == "0.50 (0.40 to 0.60)"
    assert offline.judged(rows, "kto") == ""
