"""Scores of tasks: intervals in closed form, and changes of the same documents."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxalign.evaluation.task_scores import change, compared, scores_of


def results(values, *, metric="acc", value=None, error=None, **more):
    own = float(np.mean(values)) if value is None else value
    if error is None:
        error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return {
        "results": {
            "t": {
                "alias": "t",
                "sample_len": len(values),
                f"{metric},none": own,
                f"{metric}_stderr,none": error,
            }
        },
        "samples": {"t": [{metric: one, "filter": "none"} for one in values]},
        "n-samples": {"t": {"original": 9, "effective": len(values)}},
        "n-shot": {"t": 2},
        "higher_is_better": {"t": {metric: True}},
        **more,
    }


def test_a_score_has_the_interval_of_its_standard_error():
    values = [1.0, 0.0, 1.0, 1.0]
    [score] = scores_of(results(values))
    assert (score.task, score.metric, score.filter) == ("t", "acc", "none")
    assert (score.value, score.documents, score.few_shot) == (0.75, 4, 2)
    expected = stats.norm.interval(0.95, loc=0.75, scale=stats.sem(values))
    assert score.value + score.half_width == pytest.approx(expected[1], abs=1e-4)
    assert score.by_document == tuple(values)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_answers_have_wilsons_bound(value):
    [score] = scores_of(results([value] * 20))
    wilson = stats.binomtest(int(20 * value), 20).proportion_ci(method="wilson")
    assert score.half_width == pytest.approx(wilson.high - wilson.low, abs=1e-4)


def test_what_is_no_mean_has_no_paired_interval():
    found = [
        scores_of(results([(-3.0, 2), (-4.0, 3)], metric="ppl", value=value, error="N/A"))[0]
        for value in (4.0, 5.0)
    ]
    assert found[0].half_width is None
    assert found[0].by_document == ()
    assert change(*found) == {"value": 1.0, "half_width": None}


def test_groups_have_the_pooled_standard_error():
    given = {"results": {"g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
    [score] = scores_of(given)
    assert score.half_width == pytest.approx(0.196)
    assert (score.documents, score.by_document) == (None, ())


def test_changes_are_paired(rng):
    """The interval is that of a paired t-test with its normal quantile."""
    hard = rng.random(60)
    before = (hard < 0.5).astype(float)
    after = np.where(rng.random(60) < 0.1, 1 - before, before)
    [x], [y] = (scores_of(results(values.tolist())) for values in (before, after))
    found = change(x, y)
    assert found["value"] == pytest.approx(after.mean() - before.mean())
    test = stats.ttest_rel(after, before).confidence_interval(0.95)
    ratio = 1.96 / stats.t(59).ppf(0.975)
    assert found["half_width"] == pytest.approx((test.high - test.low) / 2 * ratio)
    unpaired = math.hypot(x.half_width, y.half_width)
    assert found["half_width"] < unpaired


def test_no_change_at_all_is_not_certain():
    [score] = scores_of(results([1.0, 0.0, 1.0]))
    assert change(score, score) == {
        "value": 0.0,
        "half_width": pytest.approx(1.96**2 / (3 + 1.96**2)),
    }


def test_scores_are_compared_by_task_metric_and_filter():
    [after], [before] = (scores_of(results(own)) for own in ([1.0, 1.0, 0.0], [0.0, 1.0, 0.0]))
    [row] = compared([after], [before])
    assert row["change"]["value"] == pytest.approx(1 / 3)
    assert (row["before"]["value"], row["after"]["value"]) == pytest.approx((1 / 3, 2 / 3))
    [alone] = compared([after], None)
    assert {"before", "change"} & set(alone) == set()
    other = scores_of(results([1.0, 0.0], metric="f1"))
    assert "change" not in compared([after], other)[0]
