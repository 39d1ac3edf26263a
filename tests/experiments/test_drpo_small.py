"""The study of a real chat model with scripted ones: its cells, their resumption, its page."""

import contextlib
import json
import re

import pytest

from experiments.drpo import small, small_tables
from experiments.rows import Rows
from jaxalign.backends.client import Usage
from jaxalign.errors import UserError
from jaxalign.evaluation.just_eval import QUALITY
from tests.backends.scripted import Scripted


class Counted(Scripted):
    """With the tokens that a server counts."""

    usage = Usage(requests=1, prompt_tokens=2_000, completion_tokens=3)


def writes(text, sample):
    """The model says how often its prompt asks for it, the judge writes prompts and scores."""
    if "new_system_prompt" in text:
        now = re.findall(r"helpful assistant\.(?: Well\.)*", text)[-1]
        return json.dumps({"new_system_prompt": f"You are a {now} Well."})
    if "Choose the criteria" in text:
        return json.dumps({"reasoning": "r", "criteria": ["Depth", "Clarity"]})
    if "You judge a response" in text:
        return json.dumps({x: {"reason": "r", "score": 4} for x in ("Depth", "Clarity")})
    return "well " * text.count("Well.") + "said"


def likes(prompt, continuation):
    """The more often an answer says well, the better; Yes is as likely as No."""
    if continuation in (" Yes", " No"):
        return -1.0
    score = min(5, 2 + prompt.split("Response:")[1].count("well"))
    return 0.0 if int(continuation) == score else -50.0


@pytest.fixture
def study(tmp_path, monkeypatch):
    model, judge = Counted(writes, identity="m"), Counted(writes, likes, identity="j")
    models = {"m": model, "j": judge}
    for module in ("experiments.drpo.small", "jaxalign.prompting.drpo"):
        monkeypatch.setattr(f"{module}.make_backend", lambda name, *_: models[name])
    monkeypatch.setattr(small, "queries", lambda: [f"query {n}" for n in range(20)])
    monkeypatch.setattr(small, "held_out", lambda n: [(f"prompt {x}", "well") for x in range(n)])

    @contextlib.contextmanager
    def running(study):
        yield small.Bench(study=study, model="m", judge="j")

    monkeypatch.setattr(small, "running", running)
    study = small.Study(
        model=tmp_path / "m.gguf",
        judge=tmp_path / "j.gguf",
        rows=Rows(folder=tmp_path / "rows"),
        output=tmp_path / "out",
        found=tmp_path / "found",
        held_out=4,
    )
    return study, model, judge


CELLS = ["search", "answers/none", "answers/one_line", "answers/beam", "answers/gepa"]


def test_all_cells_and_the_page_and_nothing_is_run_twice(study, tmp_path):
    study, model, judge = study
    small.run(study, [*CELLS, "written"])
    asked = len(model.asked), len(judge.asked)
    small.run(study, [*CELLS, "written"])
    assert (len(model.asked), len(judge.asked)) == asked
    for name in small_tables.SEARCHES:
        row = study.rows[f"smollm2_search_{name}"]
        assert row["counts"]["rewarded"] + row["counts"]["optimizer"] <= small.BUDGET
        assert row["prompt"].count("Well.") >= 1
        assert (tmp_path / "found" / f"smollm2_{name}.html").exists()
    (tmp_path / "README.md").write_text(
        "".join(f"<!-- {x} -->\n<!-- /{x} -->\n" for x in ("small", "small searches"))
    )
    text = small_tables.write_page(study.rows, tmp_path)
    lines = [[x.strip() for x in line.split("|")] for line in text.splitlines()]
    [none] = [line for line in lines if line[1:2] == ["no prompt"]]
    [beam] = [line for line in lines if line[1:2] == ["beam"] and "[" in line[3]]
    assert (none[2], none[3]) == ("2.000", "")
    assert float(beam[2]) == 2.0 + study.rows["smollm2_search_beam"]["prompt"].count("Well.")
    assert beam[3].startswith(f"+{float(beam[2]) - 2:.3f}")
    assert "unreadable scores 0; scores 4: 8" in text
    assert "nats a token" in (tmp_path / "README.md").read_text()
    small_tables.plot(study.rows, ["smollm2"], tmp_path)
    assert (tmp_path / "small.png").exists()


def test_an_unknown_cell_and_a_prompt_that_was_not_searched_for(study):
    study, *_ = study
    with pytest.raises(UserError, match="none begins so"):
        small.run(study, ["beam"])
    with pytest.raises(UserError):
        small.run(study, ["answers/greedy"])


def test_words_of_a_reference_as_many_as_the_answer_has():
    assert small.overlap("The sky, blue", "the sky is blue") == pytest.approx(2 * 2 / 6)
    assert small.overlap("", "words") == 0.0
    assert small.overlap("a b", "a") == pytest.approx(2 / 3)


def test_the_interval_of_a_paired_difference():
    mean, low, high = small_tables.paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (mean, low, high) == (1.0, 1.0, 1.0)
    mean, low, high = small_tables.paired([2.0, 1.0], [1.0, 2.0])
    assert (mean, low, high) == (0.0, -1.0, 1.0)


def test_the_queries_and_the_held_out_prompts_are_short_and_apart(shared, monkeypatch):
    monkeypatch.setattr(small, "DATA", shared)
    queries, held_out = small.queries(), small.held_out(16)
    assert len(queries) >= small.VALIDATE + 9
    assert len({text for text, _ in held_out}) == 16
    assert not {text for text, _ in held_out} & set(queries)
    assert all(small.is_short(text) for text in queries)
    assert set(QUALITY) == {"Helpfulness", "Clarity", "Factuality", "Depth", "Engagement"}
