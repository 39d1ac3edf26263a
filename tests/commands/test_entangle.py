"""`jaxalign entangle` and `jaxalign filter`, from files to pages."""

import json

import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.entanglement import measurements
from tests.tiny_model import save_tiny_model

ROWS = [
    {"prompt": "Say it.", "chosen": "The cat is here.", "rejected": "The dog is here."},
    {"prompt": "Say it.", "chosen": "Yes, of course.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "Because it rains all day.", "rejected": "Go away now."},
]


@pytest.fixture
def world(tmp_path):
    """A tiny Hugging Face folder with the embedded tokenizer, and a file of three pairs."""
    save_tiny_model(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path, ["--model", str(tmp_path / "model"), "--data", str(data), "--max-length", "64"]


def test_a_page_of_pairs(world, capsys):
    folder, flags = world
    output = folder / "out"
    more = ["--heat-maps", "1", "--heat-map-tokens", "8", "--output", str(output)]
    assert main(["entangle", *flags, *more]) == 0
    said = capsys.readouterr().out
    assert "3 pairs" in said
    (row,) = [line for line in said.splitlines() if " dpo " in line]
    shares = [int(cell.strip("│ %")) for cell in row.split("│") if "%" in cell]
    assert len(shares) == 5
    assert abs(sum(shares) - 100) <= 2  # every case has a column
    lines = [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]
    assert [line["place"].rsplit(":", 1)[1] for line in lines] == ["1", "2", "3"]
    for line in lines:
        product = line["cosine"] * line["norm_chosen"] * line["norm_rejected"]
        assert line["inner"] == pytest.approx(product, rel=1e-4)
        up, down = line["change_chosen"] > 0, line["change_rejected"] < 0
        assert (line["case"] == "ideal") == (up and down)
    page = (output / "index.html").read_text(encoding="utf-8")
    assert page.count('class="heat"') == 2
    assert "http" not in page  # nothing is fetched
    assert len(list(output.glob("heat_map_*.png"))) == 2


def test_the_ledger_of_one_update(world):
    folder, flags = world
    more = ["--heat-maps", "0", "--ledger", "2", "--optimizer", "sgd", "--learning-rate", "0.1"]
    assert main(["entangle", *flags, *more, "--output", str(folder / "out")]) == 0
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert "One update (dpo, sgd, learning rate 0.1)" in page
    assert "chosen, pairs outside the batch" in page  # the third pair
    assert (folder / "out" / "ledger.png").stat().st_size


def test_a_loss_of_the_users_own_and_errors_in_one_line(world, capsys):
    folder, flags = world
    own = folder / "mine.py"
    own.write_text("def push(pairs):\n    return pairs.rejected - 2 * pairs.chosen\n")
    (folder / "run").mkdir()
    (folder / "run" / "export").symlink_to(folder / "model")
    flags = ["--model", str(folder / "run"), *flags[2:]]  # a run's folder, by its export
    out = ["--heat-maps", "1", "--heat-map-parameters", "unembedding"]
    out += ["--output", str(folder / "out")]
    assert main(["entangle", *flags, "--loss", f"{own}:push", *out]) == 0
    lines = (folder / "out" / "pairs.jsonl").read_text().splitlines()
    assert {json.loads(line)["d_w"] for line in lines} == {2.0}
    assert "Over the unembedding alone" in (folder / "out/index.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["entangle", *flags, "--loss", "tdpo1"]) == 2
    assert "tdpo1" in capsys.readouterr().err
    assert main(["entangle", *flags, "--pairs", "0"]) == 2
    assert "pairs: 0" in capsys.readouterr().err
    assert main(["entangle", *flags[:4], "--max-length", "65"]) == 2
    assert "context of 64" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["ches", "ln_ches", "last_hidden", "edit"])
def test_the_least_alike_are_kept_in_their_order(world, by, capsys):
    folder, flags = world
    every, some = folder / "every.jsonl", folder / "some.jsonl"
    assert main(["filter", *flags, "--by", by, "--keep", "1", "--output", str(every)]) == 0
    assert main(["filter", *flags, "--by", by, "--keep", "0.5", "--output", str(some)]) == 0
    assert "2 of 3 pairs" in capsys.readouterr().out
    scores = [json.loads(line)[by] for line in every.read_text().splitlines()]
    kept = [json.loads(line) for line in some.read_text().splitlines()]
    left = np.argsort(scores)[:2]
    assert [row["chosen"] for row in kept] == [ROWS[i]["chosen"] for i in sorted(left)]
    assert main(["filter", *flags, "--keep", "0", "--output", str(some)]) == 2
    assert "--keep: 0.0 is not in (0, 1]" in capsys.readouterr().err


def test_tools_stay_with_their_pair(world):
    folder, flags = world
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    (folder / "pairs.jsonl").write_text(json.dumps({**ROWS[0], "tools": tools}))
    output = folder / "out.jsonl"
    assert main(["filter", *flags, "--keep", "1", "--output", str(output)]) == 0
    row = json.loads(output.read_text())
    assert (row["prompt"], row["tools"]) == (ROWS[0]["prompt"], tools)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["filter", "--output"], "pairs.jsonl"),
        (["evaluate", "--json"], "pairs.jsonl"),
        (["steer", "--output"], "pairs.jsonl"),
        (["steer", "--output"], "model/model.safetensors"),
        (["entangle", "--output"], "."),
        (["collect", "best-of-n", "--annotator", "rule:r.py:f", "--output"], "."),
        (["judge", "--judge", "rule:r.py:f", "--output"], "."),
    ],
)
def test_no_command_overwrites_its_input(world, command, output, capsys, monkeypatch):
    folder, flags = world
    monkeypatch.chdir(folder)
    mine = folder / ("pairs.jsonl" if output == "." else output)
    if command[0] == "judge":
        mine = (folder / "pairs.jsonl").rename("human.jsonl")
        flags = ["--human", "human.jsonl#[:2]"]
    elif command[0] == "collect":
        flags = [*flags[:2], "--prompts", flags[3]]
    before = mine.read_bytes()
    assert main([*command, output, *flags]) == 2
    line = capsys.readouterr().err
    assert f"{mine.name}: is an input, and would be overwritten; set another --" in line
    assert mine.read_bytes() == before


def test_what_is_measured_is_kept_when_the_heat_maps_are_stopped(world, monkeypatch, capsys):
    folder, flags = world

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(measurements.HEAT_MAPS, "all", stopped)
    assert main(["entangle", *flags, "--output", str(folder / "out")]) == 130
    assert len((folder / "out" / "pairs.jsonl").read_text().splitlines()) == 3
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert "What each loss would do" in page
    assert 'class="heat"' not in page
    assert "gradients of pairs: batch 1 of 1" in capsys.readouterr().err
