"""Scores by aspects: their tables, their agreement, and preferences made of them."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.evaluation import agreement
from jaxalign.evaluation.just_eval import (
    AspectAnnotator,
    aspect_table,
    read_judgements,
    score_agreement,
)
from jaxalign.evaluation.single_scores import Evaluation, RuleReward


def test_rank_correlation_is_scipys(rng):
    x, y = rng.integers(1, 6, 50).astype(float), rng.integers(1, 6, 50).astype(float)
    found = score_agreement(x, y)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.equal == np.mean(x == y)
    assert found.distance == np.abs(x - y).mean()
    x[3] = math.nan
    assert score_agreement(x, y).number == 49
    assert score_agreement(y, y).spearman == pytest.approx(1.0)
    assert math.isnan(score_agreement(np.ones(4), np.arange(4.0)).spearman)


def test_what_was_not_scored_counts_nowhere(tmp_path):
    path = tmp_path / "scores.json"
    rows = [
        {"helpfulness": {"score": "4"}, "depth": {"score": "N/A"}},
        {"helpfulness": {"score": 2}, "depth": {"score": "1"}, "safety": {"score": "5"}},
    ]
    given = [
        {"id": at, "input": "q", "output_cand": "two words", "parsed_result": row}
        for at, row in enumerate(rows)
    ]
    path.write_text(json.dumps(given))
    table = aspect_table(read_judgements(path))
    assert table.means == {"Helpfulness": 3.0, "Depth": 1.0, "Safety": 5.0}
    assert table.numbers == {"Helpfulness": 2, "Depth": 1, "Safety": 1}
    assert (table.average, table.words) == (2.0, 2.0)  # safety is by itself
    assert table.leaderboard == (3 + 1 + 5) / 3
    as_five = aspect_table(read_judgements(path), inapplicable=5.0)  # just-eval's convention
    assert as_five.means == {"Helpfulness": 3.0, "Depth": 3.0, "Safety": 5.0}
    assert as_five.numbers["Depth"] == 2
    path.write_text("[1]")
    with pytest.raises(UserError, match="no just-eval judgements"):
        read_judgements(path)


def test_preferences_come_from_means_and_failures_are_none():
    def length(query, response):
        return math.nan if response == "bad" else float(len(response))

    annotator = AspectAnnotator(reward=RuleReward(length))
    found = annotator.preferences(["q"] * 4, ["aaa", "b", "cc", "bad"], ["a", "bbb", "cc", "x"])
    assert found.preference[:3].tolist() == [1.0, 0.0, 0.5]
    assert math.isnan(found.preference[3])
    assert found.failures.total() == 1
    assert agreement(found.preference, np.array([1.0, 0.0, 0.5, 1.0])).accuracy == 1.0
    assert annotator.rewards(["q"], ["abc"]).tolist() == [3.0]


def test_each_response_is_scored_once():
    asked = []

    def reward(queries, outputs):
        asked.extend(outputs)
        return [Evaluation(scores={"Depth": 3.0})] * len(outputs)

    AspectAnnotator(reward=reward).preferences(["q", "q"], ["a", "b"], ["b", "a"])
    assert sorted(asked) == ["a", "b"]


@pytest.mark.weights
def test_the_published_scores(shared):
    """Against counts of the scores: GPT-4-turbo's of gpt-3.5-turbo-0301, 1,000 responses."""
    folder = shared / "just_eval" / "judgments_gpt4turbo"
    counts = {}
    for path in folder.glob("*.json"):
        for row in json.loads(path.read_text()):
            for name, fields in row["parsed_result"].items():
                counts.setdefault(name.capitalize(), Counter())[fields["score"]] += 1
    assert counts["Factuality"]["N/A"] == 39
    rows = [row for path in sorted(folder.glob("*.json")) for row in read_judgements(path)]
    assert len(rows) == 1000
    table, as_five = aspect_table(rows), aspect_table(rows, inapplicable=5.0)
    for name, count in counts.items():
        known = {int(score): n for score, n in count.items() if score != "N/A"}
        total = sum(score * n for score, n in known.items())
        assert table.numbers[name] == sum(known.values())
        assert table.means[name] == pytest.approx(total / sum(known.values()))
        number = 200 if name == "Safety" else 800
        assert as_five.means[name] == pytest.approx((total + 5 * count["N/A"]) / number)
    six = [as_five.means[name] for name in counts]
    assert as_five.leaderboard == pytest.approx(sum(six) / 6)
    assert as_five.average == pytest.approx((sum(six) - as_five.means["Safety"]) / 5)
    assert as_five.means["Factuality"] > table.means["Factuality"]


@pytest.mark.weights
def test_a_judge_of_aspects_beside_people(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Who is {n}?", "chosen": "A boy.", "rejected": "No."} for n in range(3)]
    (tmp_path / "human.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge = f"aspects:scored:{shared}/models/stories260K"
    flags = ["--human", "human.jsonl", "--judge", judge, "--output", "out"]
    assert main(["judge", *flags]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results
    before = (tmp_path / "out" / "scores.jsonl").stat().st_size
    assert main(["judge", *flags]) == 0
    assert (tmp_path / "out" / "scores.jsonl").stat().st_size == before
