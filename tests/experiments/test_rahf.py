"""Rows, tables and the judge of the studies of representation alignment."""

import argparse

import numpy as np
import pytest

from experiments.page import half_width
from experiments.rahf import compare, methods, small, small_tables, word_reward
from experiments.rows import Rows, models_of, same_options
from jaxalign.data import PreferenceRecord
from jaxalign.errors import UserError

PLAIN = {
    "reward": [0.0, 0.0, 0.0],
    "characters": [10, 20, 30],
    "tokens": [4, 4, 4],
    "KL": [0.0, 0.0, 0.0],
    "fluency": [-1.0, -1.0, -1.0],
    "log_probs": [[-5.0, -5.0], [-5.0, -5.0], [-5.0, -5.0]],
    "answers": ["a", "b", "c"],
}
MOVED = PLAIN | {
    "reward": [1.0, 2.0, 3.0],
    "log_probs": [[-4.0, -6.0], [-7.0, -6.0], [-4.0, -4.5]],
    "KL": [2.0, 4.0, 6.0],
}


def cells(text: str, first: str) -> list[str]:
    """The cells of the line of a table that begins so."""
    return next(
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith(f"| {first} |")
    )


def test_a_table_of_one_seed_has_intervals_over_prompts():
    text = compare.tables([{"base": PLAIN, "dpo": MOVED}])
    reward, wins, _, accuracy, divergence, *_ = cells(text, "DPO")
    assert reward == f"2.000 ± {half_width([1.0, 2.0, 3.0]):.3f}"
    rates = 1 / (1 + np.exp(-np.array(MOVED["reward"])))
    assert wins == f"{rates.mean():.3f} ± {half_width(rates.tolist()):.3f}"
    assert accuracy.startswith("0.667")
    assert divergence.startswith("4.00")
    assert cells(text, "base")[1].startswith("0.500")
    moved = text.split("\n\n")[1]
    assert cells(moved, "DPO") == ["0.333", "0.333", "0.333", "0.000"]  # parted, both down, both up
    assert "preferred SFT" not in text  # it was not run


def test_a_table_of_several_seeds_has_intervals_over_seeds():
    other = MOVED | {"reward": [3.0, 4.0, 5.0]}
    text = compare.tables([{"base": PLAIN, "dpo": MOVED}, {"base": PLAIN, "dpo": other}])
    assert cells(text, "DPO")[0] == f"3.000 ± {half_width([2.0, 4.0]):.3f}"


def test_a_method_is_shown_with_the_seeds_that_have_it():
    other = MOVED | {"reward": [3.0, 4.0, 5.0]}
    seeds = [{"base": PLAIN, "dpo": MOVED, "hir": MOVED}, {"base": PLAIN, "dpo": other}]
    text = compare.tables(seeds)
    assert cells(text, "DPO")[:2] == ["2", f"3.000 ± {half_width([2.0, 4.0]):.3f}"]
    assert cells(text, "HIR")[:2] == ["1", f"2.000 ± {half_width([1.0, 2.0, 3.0]):.3f}"]
    over = text.split("\n\n")[2]
    assert cells(over, "HIR")[2] == "0.500 ± 0.000"  # over DPO, in the seed that has both
    assert cells(text, "base")[3].startswith("0.500")


def test_the_same_answers_of_the_base_in_every_seed_have_an_interval_over_prompts():
    base = PLAIN | {"reward": [1.0, 2.0, 3.0]}
    text = compare.tables([{"base": base, "dpo": MOVED}, {"base": base, "dpo": MOVED}])
    assert cells(text, "base")[0] == f"2.000 ± {half_width([1.0, 2.0, 3.0]):.3f}"


def test_a_seed_whose_rows_are_there_is_not_run_again(tmp_path, monkeypatch):
    rows, given = Rows(folder=tmp_path), argparse.Namespace(methods=["base", "dpo"])
    measured = []

    def measure(name, setting):
        measured.append(name)
        if name == "dpo" and len(measured) == 2:
            raise KeyboardInterrupt
        return PLAIN

    monkeypatch.setattr(compare, "make_setting", lambda seed, given: None)
    monkeypatch.setattr(compare, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        compare.run_seed(0, given, rows)
    compare.run_seed(0, given, rows)
    compare.run_seed(0, given, rows)
    assert measured == ["base", "dpo", "dpo"]


def test_rows_of_other_sizes_are_refused(tmp_path):
    path = tmp_path / "rows" / "options.json"
    same_options(path, {"steps": 3, "batch": None})
    same_options(path, {"steps": 3, "batch": None} | models_of(judge="a/b.gguf", model=None))
    with pytest.raises(UserError, match="another steps"):
        same_options(path, {"steps": 4, "batch": None})
    with pytest.raises(UserError, match="another judge"):
        same_options(path, models_of(judge="c.gguf"))


def test_a_batch_is_of_pairs_and_nothing_is_evaluated_in_the_runs():
    given = argparse.Namespace(output="runs", model="m", scale="small", steps=20, batch=4)
    made = compare.configs(3, given)
    assert made["dpo"].preference.batch_size == 4
    assert made["hir"].sft.batch_size == 8
    assert made["scit"].representation.batch_size == 8
    assert made["scit"].seed == 3
    assert {one.max_eval_records for one in made.values()} == {0}
    assert made["policy_gradient"].online.rollout.reward[0].endswith("word_reward.py:polite")
    assert methods.policy_gradient("tiny").online.rollout.annotator is not None


def test_the_judge_learns_which_words_are_chosen_and_knows_nothing_of_others():
    def pair(chosen, rejected):
        return PreferenceRecord(prompt="?", chosen=chosen, rejected=rejected, source="test", line=1)

    pairs = [pair(f"kindly {x}", f"obviously {x}") for x in ("red", "blue", "green", "grey")]
    judge = word_reward.fitted(pairs)
    assert set(judge.weights) == {"kindly", "obviously", "<begin> kindly", "<begin> obviously"}
    rewards = judge(["Kindly, sit.", "Obviously sit!", "sit"])
    assert rewards[0] == -rewards[1] > 0 == rewards[2]
    assert judge.accuracy([*pairs, pair("one", "two")]) == pytest.approx(0.9)
    assert word_reward.features("No way!") == {"no", "way", "!", "<begin> no", "no way", "way !"}


def test_components_and_probes_are_fitted_on_training_states_alone(rng):
    apart = np.zeros(6)
    apart[0] = 8.0

    def states(number):
        return rng.normal(size=(number, 6)) + apart, rng.normal(size=(number, 6)) - apart

    train, test = states(40), states(15)
    explained, accuracy, points = small.in_two_components(train, test)
    assert accuracy == 1.0
    assert 0.8 < explained < 1.0
    assert np.array(points).shape == (2, 15, 2)
    _, turned, _ = small.in_two_components(train, test[::-1])
    assert turned == 0.0


def test_pairs_are_counted_along_a_direction_by_layer():
    means = np.zeros((4, 2, 2, 3))
    means[:3, 0, 0, 1] = 1.0  # layer 1: three chosen ones farther along the second number
    means[0, 1, 1, 1] = 1.0  # layer 2: one rejected one, the others equal
    direction = np.array([[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    assert small.along(direction, means) == [0.875, 0.375]


def test_the_table_of_steering_has_the_gain_by_prompt(tmp_path):
    rows = Rows(folder=tmp_path)
    base = {"reward": [0.0, 2.0], "fluency": [-1.0, -2.0], "KL": [0.0, 0.0], "tokens": [5, 7]}
    base["answers"] = ["one", "two"]
    rows.write("steer_none", base)
    rows.write("steer_reps_0.1", base | {"reward": [1.0, 3.0], "KL": [1.0, 2.0]})
    text = small_tables.steering_table(rows)
    line = cells(text, "RePS (trained)")
    assert 0.7 < float(line[3]) < 0.75  # the sigmoid of 1: the answers are equally long
    assert [line[0], line[2], *line[5:]] == ["0.1", "1.00 ± 0.00", "1.5", "6"]
    assert cells(text, "none")[2:4] == ["", ""]
    assert "random" not in text


def test_pairs_are_told_apart_by_what_their_responses_do_not_share(rng):
    shift = np.zeros(6)
    shift[2] = 1.0
    response = {n: 20.0 * rng.normal(size=(n, 6)) for n in (40, 15)}
    train, test = ((x + shift, x - shift) for x in response.values())
    assert small.in_two_components(train, test)[1] < 0.8  # the response hides it
    explained, first, mean, points = small.in_differences(train, test)
    assert [explained, first, mean] == pytest.approx([1.0] * 3)
    np.testing.assert_allclose(np.abs(points)[:, :, 0], 1.0)
    assert small.in_differences(train, test[::-1])[1:3] == (0.0, 0.0)
