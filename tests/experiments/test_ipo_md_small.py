"""The study of online methods on a chat model, without weights: what resumes, what is chosen."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.ipo_md import small, small_data, small_read, small_runs, small_tables
from experiments.ipo_md.small_options import METHODS, STRENGTHS, Options, is_done, path_of, read
from jaxalign.errors import UserError


def options_in(folder, **fields):
    return Options(folder=str(folder / "runs"), rows=str(folder / "rows"), **fields)


def write_rows(options, cell, rows):
    path = path_of(options, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | {"sizes": options.sizes}) + "\n" for row in rows))


def sweep_of(annotator, wins=(0.5, 0.7, 0.6), strengths=(0.01, 0.1, 1.0)):
    return [
        {"strength": x, "seconds_per_update": 1.0, "curve": [{f"wins/{annotator}": y}]}
        for x, y in zip(strengths, wins, strict=True)
    ]


def test_cells_with_rows_of_the_same_sizes_are_not_done_again(tmp_path, monkeypatch):
    options = options_in(tmp_path, methods=("online_dpo", "grpo"), step="judge", seeds=(0,))
    write_rows(options, "annotator:reward", [{}])
    write_rows(options, "sweep:grpo", sweep_of("reward"))
    ran, names = [], ("annotator", "one", "other", "seed")

    def run_cell(one):
        ran.append(one.cell)
        rows = sweep_of("preference") if "sweep" in one.cell else [{"strength": 0.1}]
        write_rows(one, one.cell, [row | dict.fromkeys(names, 0) for row in rows])

    monkeypatch.setattr(small, "run_cell", run_cell)
    monkeypatch.setattr(small_data, "prepare", lambda options: None)
    small.main(options)
    assert ran == [
        *("annotator:preference", "annotator:judge", "reference:", "sweep:online_dpo"),
        *("final:online_dpo", "final:grpo", "judge:"),
    ]
    ran.clear()
    small.main(options)
    assert not ran
    assert not is_done(replace(options, tokens=8), "sweep:grpo")
    with pytest.raises(SystemExit, match="not one of"):
        small.main(replace(options, methods=("dpo",)))


def test_the_strength_with_most_wins_before_its_own_annotator_is_chosen(tmp_path):
    options = options_in(tmp_path)
    rows = sweep_of("preference")
    with pytest.raises(SystemExit, match="no sweep"):
        small_runs.chosen(options, "online_ipo")
    write_rows(options, "sweep:online_ipo", rows)
    assert small_runs.chosen(options, "online_ipo") == 0.1
    assert set(STRENGTHS) == set(METHODS)


def test_a_sweep_goes_on_while_the_best_strength_is_an_end(tmp_path, monkeypatch):
    options = options_in(tmp_path)
    # wins rise as the strength falls, but for the weakest one
    wins = {1.0: 0.5, 0.1: 0.6, 0.01: 0.7, 0.001: 0.8, 0.0001: 0.75}
    tried = []

    def trained(bench, strengths, seeds, *sizes, **others):
        tried.append(list(strengths))
        return None, sweep_of("preference", [wins[x] for x in strengths], strengths)

    monkeypatch.setattr(small_runs, "Bench", lambda *_: SimpleNamespace(own="preference"))
    monkeypatch.setattr(small_runs, "trained", trained)
    cell = "sweep:online_ipo"
    # three strengths of an earlier version, and final runs of the best of them
    write_rows(options, cell, sweep_of("preference", (0.7, 0.6, 0.5)))
    write_rows(
        options, "final:online_ipo", [{"strength": 0.01, "seed": seed} for seed in options.seeds]
    )
    assert small.is_missing(options, cell)
    assert not small.is_missing(options, "final:online_ipo")
    assert len(small_runs.sweep(options, "online_ipo")) == 5
    assert len(read(path_of(options, cell))) == 5  # written as they come
    assert tried == [[0.001], [0.0001]]
    assert not small.is_missing(options, cell)
    assert small_runs.chosen(options, "online_ipo") == 0.001
    assert small.is_missing(options, "final:online_ipo")  # of another strength
    upward = sweep_of("preference", (0.5, 0.6, 0.7))
    assert small_runs.untried([], "online_ipo") == [0.01, 0.1, 1.0]
    assert small_runs.untried(upward, "online_ipo") == [10.0]
    upward += sweep_of("preference", (0.8, 0.9), (10.0, 100.0))
    assert small_runs.untried(upward, "online_ipo") == []  # enough is enough


def test_a_further_seed_is_run_beside_those_that_are_kept(tmp_path, monkeypatch):
    options = options_in(tmp_path, methods=("online_dpo",), seeds=(0, 1), updates=8)
    names, asked = ("online_dpo", "reference"), []

    def trained(bench, strengths, seeds, updates, *sizes, **others):
        asked.append((strengths, list(seeds), updates))
        rows = [{"strength": 0.1, "seed": seed, "updates": updates} for seed in seeds]
        return None, rows

    def answers(bench, state, part, number, seeds, draw):
        one = np.ones([len(seeds), 1, 1])
        texts = [[f"of seed {seed}"] for seed in seeds]
        return small_runs.Answers(texts=texts, kl=one, length=one, finished=one)

    bench = SimpleNamespace(own="preference", runs=SimpleNamespace(begin=lambda seeds: None))
    monkeypatch.setattr(small_runs, "Bench", lambda *_: bench)
    monkeypatch.setattr(small_runs, "trained", trained)
    monkeypatch.setattr(small_runs, "answers", answers)
    monkeypatch.setattr(small, "enable_compilation_cache", lambda: None)
    write_rows(options, "sweep:online_dpo", sweep_of("preference"))
    for cell in ("reference:", "final:online_dpo"):
        small.run_cell(replace(options, cell=cell))
    known = [
        {"annotator": name, "one": "online_dpo", "other": "reference", "seed": seed}
        for name in ("reward", "preference", "judge")
        for seed in (0, 1)
    ]
    write_rows(options, "judge:", known)
    assert not any(small.is_missing(options, x) for x in ("reference:", "final:online_dpo"))

    later = replace(options, seeds=(0, 1, 2), updates=16)
    assert not small_runs.unjudged(later)  # nobody has said anything with that seed yet
    for cell in ("reference:", "final:online_dpo"):
        assert small.is_missing(later, cell)
        small.run_cell(replace(later, cell=cell))
        assert not small.is_missing(later, cell)
    assert asked == [([0.1, 0.1], [0, 1], 8), ([0.1], [2], 8)]  # as many updates as the others
    assert [row["seed"] for row in read(path_of(later, "final:online_dpo"))] == [0, 1, 2]
    for name in names:
        own = small_tables.by_seed(read(small_runs.responses_of(later, name)), "response")
        assert own == {seed: [f"of seed {seed}"] for seed in (0, 1, 2)}
    assert len(read(path_of(later, "judge:"))) == 6  # the verdicts on kept runs stay
    assert [seed for *_, seed in small_runs.unjudged(later)] == [2, 2, 2]
    # with another strength all of them are run again
    write_rows(later, "sweep:online_dpo", sweep_of("preference", (0.5, 0.6, 0.7)))
    small.run_cell(replace(later, cell="final:online_dpo"))
    assert asked[-1] == ([1.0, 1.0, 1.0], [0, 1, 2], 16)
    assert not read(path_of(later, "judge:"))


def test_verdicts_on_what_a_policy_said_before_go(tmp_path, monkeypatch):
    options = options_in(tmp_path)
    both = [{"one": "grpo", "other": "reference"}, {"one": "egpo", "other": "grpo"}]
    last = {"annotator": "judge", "one": "egpo", "other": "reference"}
    write_rows(options, "judge:", [*both, last])
    path = tmp_path / "rows" / small_tables.READ
    path.write_text('{"policy": "grpo"}\n{"policy": "egpo"}\n')
    small_runs.forget(options, "grpo")
    assert [row["one"] for row in read(path_of(options, "judge:"))] == ["egpo"]
    assert read(path) == [{"policy": "egpo"}]
    monkeypatch.setattr(small, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(small, "train_annotator", lambda options, name: [{}])
    small.run_cell(replace(options, cell="annotator:reward"))
    assert read(path_of(options, "judge:"))
    small.run_cell(replace(options, cell="annotator:judge"))
    assert not read(path_of(options, "judge:"))


def test_the_judge_reads_what_it_has_not_read(tmp_path):
    options = options_in(tmp_path, methods=("online_dpo", "grpo"), seeds=(0,))
    write_rows(options, "responses_online_dpo", [{"seed": 0}])
    write_rows(options, "responses_reference", [{"seed": 0}])
    first = small_runs.unjudged(options)
    assert first == [
        (name, "online_dpo", "reference", 0) for name in ("reward", "preference", "judge")
    ]
    names = ("annotator", "one", "other", "seed")
    write_rows(options, "judge:", [dict(zip(names, x, strict=True)) for x in first])
    assert not small.is_missing(options, "judge:")
    write_rows(options, "responses_grpo", [{"seed": 0}])
    assert small.is_missing(options, "judge:")
    later = replace(options, methods=("grpo", "online_dpo"))  # the same pairs the other way round
    assert len(small_runs.unjudged(later)) == 4
    assert ("judge", "grpo", "online_dpo", 0) in small_runs.unjudged(later)


def test_methods_learn_from_as_many_responses_in_an_update(tmp_path):
    options = options_in(tmp_path, prompts=8)
    assert {name: options.prompts_of(name) for name in ("ipo_md", "egpo", "grpo")} == {
        **dict.fromkeys(("ipo_md", "egpo"), 8),
        "grpo": 4,
    }


def test_people_are_asked_about_whole_answers_alone(tmp_path):
    class Words:
        def encode(self, text, add_special_tokens):
            return text.split(" ")

        def decode(self, tokens, **options):
            return " ".join(tokens)

    file = tmp_path / "pairs.jsonl"
    pairs = [("yes", "no"), ("one two three", "no"), ("same same x", "same same y")]
    lines = [{"prompt": "q", "chosen": x, "rejected": y} for x, y in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words: Any = Words()
    found = {
        source: [
            (row["chosen"], row["rejected"]) for row in small_data._pairs(file, source, words, 2)
        ]
        for source in ("people", "polite")
    }
    assert found == {"people": [("yes", "no")], "polite": [("yes", "no"), ("one two", "no")]}


def test_a_judge_that_reads_is_shown_beside_the_others_and_reads_only_what_is_new(tmp_path):
    def responses(policy, *texts):
        rows = [
            {"policy": policy, "seed": 0, "prompt": at, "response": text}
            for at, text in enumerate(texts)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"responses_{policy}.jsonl").write_text(lines)

    responses("reference", "a", "bb", "c", "dd")
    responses("online_dpo", "aa", "b", "cc", "d")
    responses("grpo", "a", "b", "c", "d")
    row = {
        "judge": "qwen",
        "policy": "online_dpo",
        "seed": 0,
        "preference": [0.9, 0.6, 0.2, None],
        "same_in_both_orders": 0.5,
    }
    (tmp_path / small_tables.READ).write_text(json.dumps(row) + "\n")
    assert small_read.missing(tmp_path) == [("grpo", 0)]
    small_read.check_judge(tmp_path / small_tables.READ, "qwen")
    with pytest.raises(UserError, match=r"read\.jsonl: has verdicts of qwen"):
        small_read.check_judge(tmp_path / small_tables.READ, "another")
    others = [
        {
            "annotator": name,
            "one": "online_dpo",
            "other": "reference",
            "seed": 0,
            "preference": preference,
        }
        for name, preference in (
            ("reward", [0.9, 0.9, 0.9, 0.9]),
            ("preference", [0.9, 0.9, 0.1, 0.9]),
            ("judge", [0.1, 0.1, 0.9, 0.9]),
        )
    ]
    said = {
        name: small_tables.by_seed(read(tmp_path / f"responses_{name}.jsonl"), "response")
        for name in ("reference", "online_dpo", "grpo")
    }
    text = small_tables.reader([row], others, said)
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "DPO"
    assert cells[1].startswith("0.67 ±")  # two of the three verdicts that can be read
    assert cells[3:] == ["0.50", "0.67", "1.00", "0.00"]
    assert small_tables.reader([], others, said) == ""


def test_a_policy_that_is_not_judged_yet_is_left_out_of_the_figure(tmp_path):
    options = options_in(tmp_path)
    curve = [{"update": at, "reward": 0.0, "kl": 0.1 * at, "length": 9} for at in (0, 4)]
    for name in ("online_dpo", "grpo"):
        write_rows(options, f"final:{name}", [{"curve": curve}])
        write_rows(options, f"responses_{name}", [{"log_ratio": 0.5}])
    judged = {"one": "online_dpo", "other": "reference", "seed": 0, "preference": [0.6, 0.4, 0.7]}
    rows = [judged | {"annotator": annotator} for annotator in ("preference", "judge")]
    write_rows(options, "judge:", rows)
    small_tables.draw(tmp_path / "rows", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
