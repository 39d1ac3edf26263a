"""The studies of real judges and of collected data: splits, questions, tables from rows."""

import math

import numpy as np
import pytest

from experiments.data_collection import small as collected
from experiments.judging import small, small_tables
from experiments.judging.compare import Comparisons
from experiments.rows import Rows
from jaxalign.errors import UserError
from jaxalign.evaluation import Verdicts


def written(tmp_path, **judges: list[list[float | None]]) -> Rows:
    """Rows of two comparisons of each set, the better one longer and shorter."""
    rows = Rows(folder=tmp_path / "rows")
    own = {"request": ["a", "b"], "part": ["Natural", "CaseStudy Base 9"]}
    own |= {"better_words": [9, 2], "worse_words": [3, 5]}
    rows.write("comparisons", {"number": 2, "choice": {}, "sets": dict.fromkeys(small.SETS, own)})
    for name, orders in judges.items():
        by_order = np.array(orders, float)
        found = Verdicts(
            preference=by_order.mean(1),
            reasons=("", "x" * bool(None in orders[1])),
            by_order=by_order,
        )
        rows.write(name, {"sets": dict.fromkeys(small.SETS, small.in_table(found))})
    return rows


def test_a_biased_judge_is_shown_with_its_bias(tmp_path):
    # always prefers what is shown first, but more so where people agree
    rows = written(tmp_path, lm=[[0.9, 0.4], [0.7, 0.2]], first=[[1.0, 0.0], [1.0, 0.0]])
    head, _, first, lm = small_tables.main_table(rows, ["first", "lm"], None).splitlines()
    assert "all (4)" in head
    assert "better one is longer (2)" in head
    assert "| always the first | 0.500 (0.500 to 0.500) | 0.00 |" in first
    cells = [cell.strip() for cell in lm.split("|")]
    assert cells[2].startswith("0.500 (0.000")  # right on the first, wrong on the second
    assert cells[6:8] == ["**1.000 (1.000 to 1.000)**", "0.000 (0.000 to 0.000)"]
    assert cells[8:12] == ["0.50", "0.00", "0.75", "0"]


def test_missing_verdicts_are_counted_and_survive_the_file(tmp_path):
    rows = written(tmp_path, lm=[[0.9, 0.8], [None, None]])
    verdicts, columns = small_tables.together(rows, "lm")
    assert np.isnan(verdicts.preference).tolist() == [False, True, False, True]
    assert small_tables.lead(columns).tolist() == [6, -3, 6, -3]
    assert small_tables.main_table(rows, ["lm"], None).rstrip().endswith("| 2 |")
    assert "CaseStudy | 1 | –" in small_tables.parts_table(rows, ["lm"], None)
    small_tables.plot(rows, ["lm"], None, tmp_path / "small.png")
    assert "small.png" in small_tables.sections(rows)["small"]


def test_the_question_is_chosen_by_agreement_and_an_unreadable_one_counts_a_half(tmp_path):
    rows = Rows(folder=tmp_path)
    orders = {"default": [[0.9, 0.2]], "short": [[math.nan, math.nan]]}
    orders["short, for chat"] = [[0.6, 0.55]]
    for name, own in orders.items():
        by_order = np.array(own)
        verdicts = Verdicts(preference=by_order.mean(1), reasons=("",), by_order=by_order)
        sets = dict.fromkeys(small.SETS, small.in_table(verdicts))
        rows.write(small_tables.question_row("lm", name), {"sets": sets})
    # the default one agrees as well, but gives two winners in two orders
    assert small_tables.chosen_question(rows, "lm") == "short, for chat"
    table = small_tables.questions_table(rows)
    assert "| short |  |  |  | 2 |" in table


def test_comparisons_of_the_choice_are_in_no_table(tmp_path, monkeypatch):
    every = Comparisons(
        prompts=[f"q{at // 2}" for at in range(40)],
        better=["b" * (at % 7) for at in range(40)],
        worse=["w"] * 40,
        part=["p"] * 40,
    )
    monkeypatch.setattr(small, "read", lambda name: (every, 0))
    options = small.Options(choice=3, number=8, more=2, longest=7, rows=tmp_path)
    choice, tables = small.drawn("LLMBar", options)
    assert len(choice) == 3
    assert len(tables) == 10
    assert len({*choice.prompts, *tables.prompts}) == 13  # one of each request
    assert max(map(len, tables.better)) <= 4
    with pytest.raises(UserError, match="short comparisons, fewer than 33"):
        small.drawn("LLMBar", small.Options(choice=3, number=30, rows=tmp_path))


def pandalm() -> list[dict[str, str]]:
    return [
        {"prompt": f"p{at // 3}", "chosen": f"good {at}", "rejected": "bad" * (1 + at % 3)}
        for at in range(30)
    ]


def test_collected_and_held_out_prompts_are_apart():
    options = collected.Options(number=4, each=2, longest=8)
    data = collected.split(pandalm(), options)
    assert len(data.prompts) == len(data.people) == 4
    assert not set(data.prompts) & set(data.fresh)
    assert {pair["prompt"] for pair in data.pairs} == set(data.fresh)
    assert len(data.pairs) == 12  # of three each, the third is too long
    with pytest.raises(UserError, match="10 short prompts"):
        collected.split(pandalm(), collected.Options(number=10, longest=8))


def test_tables_of_collected_data_come_from_rows(tmp_path):
    rows = Rows(folder=tmp_path)
    shown = [{"prompt": "Say\nyes | no", "chosen": "word " * 100, "rejected": "<b>"}]
    pairs = {
        "pairs": 2,
        "words": {"chosen": [4, 6], "rejected": [2, 6]},
        "reward_prefers_chosen": [0.9, 0.4],
        "statistics": {"left_out": {"duplicate": 3}, "faults": {"critique: empty": 1}},
        "shown": shown,
        "seconds": 60.0,
        "cpu_seconds": 60.0,
    }
    rows.write("pairs_society", pairs)
    rows.write("data", {"pair_prompts": [0, 1], "pair_words": [[5, 3], [2, 4]]})
    answers = {"answers": ["a b c", "d e"], "finished": [True, False]}
    base = answers | {"log_probs": [[-5.0, -5.0], [-4.0, -6.0]], "rewards": [0.0, 1.0]}
    rows.write("base", base)
    after = answers | {"log_probs": [[-4.0, -7.0], [-5.0, -6.0]], "rewards": [1.0, 1.0]}
    rows.write("dpo_society", after | {"pairs": 2})
    text = "\n".join(collected.sections(rows).values())
    assert (
        "| society | 2 | 5.0 | 4.0 | 0.75 | 0.50 | 3 duplicate; 1 critique: empty | 1.0 |" in text
    )
    cells = "0.500 (0.000 to 1.000) | 1.00 | 0.00 | +1.00 (-1.00 to +3.00) | +0.0"
    assert f"| society | 2 | {cells} |" in text
    assert r"Say yes \| no" in text
    assert "&lt;b>" in text
    assert text.count("…") == 1
