"""What the studies of judges and of collected data compute around the library."""

import json
import math

import numpy as np
import pytest

from experiments.data_collection import compare as collected
from experiments.data_collection.rules import glad, polite
from experiments.judging import reward_model
from experiments.judging.compare import Comparisons, right, turned
from experiments.judging.likelihood import Likelihood
from experiments.judging.rules import coin, longer, overlap
from jaxalign.evaluation import Verdicts
from tests.backends.scripted import Scripted


class Tokens(Scripted):
    """Two characters are a token."""

    def score(self, prompts, continuations):
        found = super().score(prompts, continuations)
        return [
            type(one)(log_prob=one.log_prob, tokens=len(text) // 2)
            for one, text in zip(found, continuations, strict=True)
        ]


def test_likelihoods_are_by_token_and_what_does_not_fit_has_no_verdict():
    def likes(prompt, continuation):
        if continuation == " long!":
            return math.nan
        # sums: " aaa" -4 over 2 tokens, " bbbbb" -6 over 3, less -2 and -9 without the request
        known = {" aaa": (-4.0, -2.0), " bbbbb": (-6.6, -9.0)}[continuation]
        return known["Human" not in prompt]

    backend = Tokens(likes=likes)
    sides = ["aaa", "bbbbb", "aaa"], ["bbbbb", "aaa", "long!"]
    plain = Likelihood(backend=backend).preferences(["q"] * 3, *sides)
    assert plain.preference[:2].tolist() == [1.0, 0.0]  # -2 a token above -2.2
    gained = Likelihood(backend=backend, gained=True).preferences(["q"] * 3, *sides)
    assert gained.preference[:2].tolist() == [0.0, 1.0]  # -1 a token below +0.8
    for found in (plain, gained):
        assert math.isnan(found.preference[2])
        assert found.reasons[2]


def test_sides_are_turned_back():
    orders = np.array([[0.9, 0.7], [0.8, 0.2]])
    given = Verdicts(preference=np.array([0.8, 0.3]), reasons=("", ""), by_order=orders)
    found = turned(given, [False, True])
    assert found.preference == pytest.approx([0.8, 0.7])
    assert found.by_order == pytest.approx(np.array([[0.9, 0.7], [0.8, 0.2]]))
    assert found.order_consistency == given.order_consistency
    assert found.first_position_rate == pytest.approx(given.first_position_rate)
    assert right(found).tolist() == [1.0, 1.0]
    ties = Verdicts(preference=np.array([0.5, math.nan, 0.1]), reasons=("", "x", ""))
    assert right(ties)[[0, 2]].tolist() == [0.5, 0.0]
    assert math.isnan(right(ties)[1])


def test_some_comparisons_stay_together():
    texts = [str(at) for at in range(20)]
    some = Comparisons(prompts=texts, better=texts, worse=texts, part=texts).some(5)
    assert len(some) == 5
    assert some.prompts == some.better == some.worse == some.part
    assert list(map(int, some.prompts)) == sorted(map(int, some.prompts))


def test_judged_prompts_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_model, "DATA", tmp_path)
    (tmp_path / "preferences").mkdir()
    for name in reward_model.SOURCES:
        rows = [
            {"prompt": p, "chosen": "a", "rejected": "b", "id": 1} for p in (name, "What  IS it")
        ]
        path = tmp_path / "preferences" / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    assert reward_model.write_pairs(["what is\nit"], tmp_path / "pairs.jsonl") == (2, 2)
    kept = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == list(reward_model.SOURCES)


def test_rules():
    assert longer("q", "abc") == 3.0
    assert overlap("Is the sea blue?", "The sea!") == 0.5
    assert coin("q", "a") == coin("q", "a") != coin("q", "b")
    assert glad("q", "They laughed. Fun!") == pytest.approx(200 / 3)
    assert polite("q", "Thanks, I would") == pytest.approx(200 / 3)


def test_what_a_row_says(rng):
    """Accuracy is by the gain over the base; one response in two is the base's own."""
    task = collected.Task(
        name="glad",
        model="",
        prompts=[],
        held_out=["p", "q"],
        prompt_format="{prompt} ",
        annotator="",
        judge="rule:",
        rule=glad,
        labelled={},
        pairs={"own": [{}] * 4},
        methods={},
    )
    base = {"responses": [["sad", "bad"]] * 2, "log_probs": {"own": [[-9.0, -1.0]] * 4}}
    gained = [[-8.0, -1.0], [-8.5, -0.6], [-9.0, -1.0], [-10.0, -0.5]]
    own = {"responses": [["fun fun", "bad"]] * 2, "log_probs": {"own": gained}}

    class Judge:
        def rewards(self, prompts, responses):
            return np.array([glad(*row) for row in zip(prompts, responses, strict=True)])

        def preferences(self, prompts, first, second):
            gap = self.rewards(prompts, first) - self.rewards(prompts, second)
            return Verdicts(preference=0.5 + 0.5 * np.sign(gap), reasons=("",) * len(gap))

    found = collected.scored(task, own, base, Judge())
    assert found["accuracy, own"] == (1 + 1 + 0.5 + 0) / 4
    assert found["rule"] == 50.0
    assert found["words"] == 1.5
    assert found["preference"].tolist() == [1.0, 0.5, 1.0, 0.5]
    page = collected.rows_of_table(task, [{"base": found, "x": found}], ["base", "x"])
    assert "| x |  | 0.750 (0.750 to 0.750) | 50.00 | 1.5 |" in page
