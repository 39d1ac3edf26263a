"""`jaxalign judge`, from files of outputs to tables, pages and one-line errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxalign.cli import main
from tests.tiny_model import save_tiny_model

RULES = '''
def quality(prompt, response):
    """The number that every response below ends with."""
    return float(response.rsplit(" ", 1)[-1])

def first_mostly(prompt, first, second):
    return 0.5 + 0.3 + 0.1 * (quality(prompt, first) > quality(prompt, second))

def picky(prompt, response):
    if prompt == "p3":
        raise ValueError("not this one")
    return quality(prompt, response)
'''


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Twenty prompts; `policy(name, qualities)` writes a policy's file, `judge(...)` runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # tables are not wrapped
    (tmp_path / "rules.py").write_text(RULES)

    def policy(name, qualities, extra=""):
        rows = [
            {"prompt": f"p{n}", "response": f"{name} <b>says</b>{extra} {quality}"}
            for n, quality in enumerate(qualities)
        ]
        return write(tmp_path / f"{name}.jsonl", rows)

    def judge(*arguments, rule="quality", examples=2):
        flags = ["--judge", f"rule:rules.py:{rule}", "--output", "out", "--resamples", "50"]
        return main(["judge", *arguments, *flags, "--examples", str(examples)])

    return policy, judge


def results(folder="out"):
    with open(f"{folder}/results.json", encoding="utf-8") as file:
        return json.load(file)


def test_two_policies(world, capsys):
    policy, judge = world
    a = policy("strong", [*range(1, 16), 0, 0, 0, 0, 5])
    b = policy("weak", [*range(0, 15), 3, 3, 3, 3, 5])
    assert judge("--a", a, "--b", b) == 0
    found = results()["pairs"][0]
    assert found["win_rate"]["rate"] == pytest.approx(15.5 / 20)
    assert [found["win_rate"][name] for name in ("wins", "ties", "losses")] == [15, 1, 4]
    printed = capsys.readouterr().out
    assert "15/1/4" in printed
    assert "0.557 – 0.904" in printed  # Wilson's of 15.5 of 20, by hand
    with open("out/verdicts.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [line["preference"] for line in lines] == [1.0] * 15 + [0.0] * 4 + [0.5]
    assert lines[15]["place"].endswith("strong.jsonl:16")
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert "http" not in page  # nothing is fetched
    assert "<b>says</b>" not in page  # what models write is text
    assert page.count("<article>") == 4
    assert judge("--a", b, "--b", a) == 0
    assert results()["pairs"][0]["win_rate"]["rate"] == pytest.approx(1 - 15.5 / 20)


def test_an_order_biased_judge_is_shown_to_be_one(world, capsys):
    policy, judge = world
    a, b = policy("a", range(1, 21)), policy("b", range(20))
    assert judge("--a", a, "--b", b, rule="first_mostly") == 0
    judging = results()["judging"]
    assert judging["order_consistency"] == 0.0
    assert judging["first_position_rate"] == pytest.approx(0.85)
    assert results()["pairs"][0]["win_rate"]["rate"] == pytest.approx(0.55)
    assert "The order decides" in Path("out/index.html").read_text(encoding="utf-8")


def test_failures_are_left_out_and_told(world, capsys):
    policy, judge = world
    a, b = policy("a", [1, 1, 1, 9]), policy("b", [0, 0, 2, 0])
    assert judge("--a", a, "--b", b, rule="picky") == 0
    found = results()
    assert found["pairs"][0]["win_rate"]["rate"] == pytest.approx(2 / 3)
    assert found["pairs"][0]["win_rate"]["failures"] == 1
    ((reason, number),) = found["judging"]["failures"].items()
    assert number == 1
    assert reason.startswith("it raises ValueError: not this one (at ")
    assert reason.endswith('raise ValueError("not this one"))')  # the user's own line
    assert "1 of 4 comparisons without a verdict" in capsys.readouterr().out


def test_many_policies_with_seeds(world, capsys, rng):
    policy, judge = world
    means = {"best": 2.0, "middle": 1.0, "worst": 0.0}
    files = {
        name: [policy(f"{name}{seed}", rng.normal(mean, 1, size=60)) for seed in range(3)]
        for name, mean in means.items()
    }
    flags = [f"{name}={file}" for name, some in files.items() for file in some]
    assert judge("--outputs", *flags) == 0
    found = results()
    assert [pair["seeds"]["number"] for pair in found["pairs"]] == [9, 9, 9]
    scores = {
        name: [
            [float(line.split()[-1].strip('"}')) for line in Path(file).read_text().splitlines()]
            for file in some
        ]
        for name, some in files.items()
    }
    for pair in found["pairs"]:
        one, other = (np.array(scores[name]) for name in pair["names"])
        rates = [(x > y).mean() for x in one for y in other]
        assert pair["win_rate"]["rate"] == pytest.approx(np.mean(rates))
        assert pair["seeds"]["mean"] == pytest.approx(np.mean(rates))
        assert pair["seeds"]["std"] == pytest.approx(np.std(rates, ddof=1))
    elo = {name: found["elo"][name]["elo"] for name in means}
    assert elo["best"] > elo["middle"] > elo["worst"]
    assert np.mean(list(elo.values())) == pytest.approx(1000)
    assert found["baseline"] == "worst"
    assert set(found["over_baseline"]) == {"best", "middle"}
    assert "over seeds" in capsys.readouterr().out


def test_ids_match_rows_whatever_their_order_and_alpaca_evals_names_are_read(world, tmp_path):
    _, judge = world
    rows = [{"id": n, "instruction": "same", "output": f"x {n}"} for n in range(4)]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [row | {"output": "y 1"} for row in rows[::-1]])
    assert judge("--a", a, "--b", b) == 0
    assert results()["pairs"][0]["win_rate"]["wins"] == 2
    assert results()["pairs"][0]["win_rate"]["ties"] == 1


def test_a_judge_beside_people(world, tmp_path, capsys):
    _, judge = world
    rows = [
        {"prompt": "p", "chosen": "x 2", "rejected": "y 1", "source": "easy"},
        {"prompt": "p", "chosen": "x 1", "rejected": "y 2", "source": "hard"},
        {"prompt": "p", "chosen": "x 3", "rejected": "y 1", "source": "hard"},
        {"prompt": "p", "first": "x 3", "second": "y 1", "preference": 0, "source": "hard"},
        {"prompt": "p", "first": "x 3", "second": "y 3", "preference": 0.5, "source": "easy"},
    ]
    data = write(tmp_path / "labels.jsonl", rows)
    assert judge("--human", data, "--by", "source") == 0
    found = results()["human"]
    assert found["all"]["accuracy"] == pytest.approx(2 / 4)
    assert found["source easy"]["accuracy"] == 1.0
    assert found["source hard"]["accuracy"] == pytest.approx(1 / 3)
    assert "no better than chance" in capsys.readouterr().out
    assert "Against people" in Path("out/index.html").read_text(encoding="utf-8")


def test_a_language_model_judges_and_goes_on(world, tmp_path, capsys):
    """The second run finds every answer in its file."""
    policy, _ = world
    save_tiny_model(tmp_path / "model", layers=1, context_length=512)
    a, b = policy("a", range(1, 4)), policy("b", range(3))
    command = ["judge", "--a", a, "--b", b, "--judge", f"lm:{tmp_path / 'model'}", "--output"]
    assert main([*command, "out"]) == 0
    first = results()
    kept = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(kept) == 6
    assert all(0 <= json.loads(line)["preference"] <= 1 for line in kept)
    (tmp_path / "out" / "answers.jsonl").write_text("\n".join(kept[:4]) + "\n")
    assert main([*command, "out"]) == 0
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 6
    again = results()
    assert again["pairs"][0]["win_rate"]["rate"] == pytest.approx(
        first["pairs"][0]["win_rate"]["rate"], abs=1e-6
    )


def complaint(capsys, run):
    capsys.readouterr()
    assert run() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_errors_name_file_and_line(world, tmp_path, capsys):
    policy, judge = world
    a, b = policy("a", range(4)), policy("b", range(3))
    error = complaint(capsys, lambda: judge("--a", a, "--b", b))
    assert "a.jsonl:4: " in error
    assert "add --common" in error
    assert judge("--a", a, "--b", b, "--common") == 0
    assert results()["prompts"] == 3
    row = {"prompt": "p0", "response": "x 1"}
    twice = write(tmp_path / "twice.jsonl", [row, row])
    error = complaint(capsys, lambda: judge("--a", a, "--b", twice))
    assert "twice.jsonl:2: the same prompt comes twice" in error
    assert "twice.jsonl:1" in error
    bare = write(tmp_path / "bare.jsonl", [row, {"prompt": "p1", "text": "x"}])
    error = complaint(capsys, lambda: judge("--a", a, "--b", bare))
    assert "bare.jsonl:2: missing field: no response or completion or output" in error
    numbered = [{"id": 1, "prompt": "p", "response": "x 1"}]
    other = [{"id": 1, "prompt": "q", "response": "x 1"}]
    one, two = write(tmp_path / "1.jsonl", numbered), write(tmp_path / "2.jsonl", other)
    error = complaint(capsys, lambda: judge("--a", one, "--b", two))
    assert "2.jsonl:1: id 1 has another prompt than at" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to judge"),
        (["--a", "a.jsonl"], "--b is missing"),
        (["--outputs", "a.jsonl"], "not NAME=FILE"),
        (["--outputs", "a=a.jsonl"], "a alone"),
        (["--a", "a.jsonl", "--b", "b.jsonl", "--baseline", "c"], "c is none of a, b"),
        (["--a", "a.jsonl", "--b", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--a", "a.jsonl", "--b", "b.jsonl", "--confidence", "95"], "confidence: 95"),
        (["--by", "kind", "--a", "a.jsonl", "--b", "b.jsonl"], "--human, which is not given"),
        (["--human", "a.jsonl"], "a.jsonl:1: missing field: no chosen"),
    ],
)
def test_flags_that_do_not_fit(world, capsys, flags, words):
    policy, judge = world
    policy("a", range(2))
    policy("b", range(2))
    assert words in complaint(capsys, lambda: judge(*flags))


@pytest.mark.weights
def test_a_rule_of_length_on_real_outputs_and_labels(shared, tmp_path, capsys):
    """Counted again here: how often the longer of two models' outputs is the first one's."""
    rule = tmp_path / "rules.py"
    rule.write_text("def longer(prompt, response):\n    return len(response)\n")
    models = ["gpt-4-0613", "zephyr-7b-beta"]
    files = [shared / "just_eval" / "outputs" / f"{name}.json" for name in models]
    lengths = [[len(row["output"]) for row in json.loads(file.read_text())] for file in files]
    flags = ["--judge", f"rule:{rule}:longer", "--output", str(tmp_path), "--resamples", "20"]
    assert main(["judge", "--a", str(files[0]), "--b", str(files[1]), *flags]) == 0
    pair = results(tmp_path)["pairs"][0]
    expected = np.mean(np.sign(np.subtract(*lengths)) / 2 + 0.5)
    assert pair["win_rate"]["rate"] == pytest.approx(expected)
    assert abs(pair["length_controlled"]["rate"] - 0.5) < 0.05
    labels = shared / "judging" / "llmbar_all.jsonl"
    assert main(["judge", "--human", str(labels), "--by", "source", *flags]) == 0
    human = results(tmp_path)["human"]
    # adversarial sets are built so that the worse response looks better: long ones mislead
    assert human["source llmbar/Adversarial_Neighbor"]["accuracy"] < 0.2
    assert human["source llmbar/Processed_MT-Bench"]["accuracy"] > 0.6
    assert not math.isnan(human["all"]["kappa"])
