"""The data card in the terminal, as a figure and as a page."""

import json

import pytest

from jaxalign.cli import main
from jaxalign.data.card import Reading, data_cards
from jaxalign.data.mixtures import weighted_sources
from jaxalign.reporting.data_card import card_charts, shortened
from tests.data.test_card import TOKENIZER, write

TALK = [{"role": "user", "content": "<b>hi</b>"}, {"role": "assistant", "content": "yes <i>"}]


@pytest.fixture
def sources(tmp_path):
    pairs = [
        {"prompt": f"Say {n}", "chosen": f"{n} it is " * (n + 1), "rejected": "no"}
        for n in range(20)
    ]
    return [
        write(tmp_path / "pairs.jsonl", [*pairs, {"prompt": "x", "chosen": "y"}]),
        write(tmp_path / "talks.jsonl", [{"messages": TALK}] * 5),
    ]


@pytest.fixture
def tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("number", [1, 2])
def test_the_command_prints_and_writes_the_card(tmp_path, sources, tokenizer, capsys, number):
    folder = tmp_path / "card"
    words = [*sources[-number:], "--tokenizer", tokenizer, "--output", str(folder)]
    assert main(["data", *words, "--max-length", "24"]) == 0
    out = capsys.readouterr().out
    assert "talks" in out
    assert "⟦ yes <i>" in out
    numbers = json.loads((folder / "card.json").read_text())
    assert numbers["max_length"] == 24
    assert [one["label"] for one in numbers["sources"]] == ["pairs", "talks"][-number:]
    if number == 2:
        assert numbers["sources"][0]["skipped"] == {"missing field": 1}
        assert "missing field" in out
    image = (folder / "card.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 200_000
    page = (folder / "index.html").read_text()
    assert "<mark> yes &lt;i&gt;" in page
    assert "<b>hi" not in page
    assert "&lt;b&gt;hi" in page


def test_bad_records_can_stop_the_command(sources, tokenizer, capsys):
    words = [sources[0], "--tokenizer", tokenizer, "--bad-records", "error"]
    assert main(["data", *words]) == 2
    assert "pairs.jsonl:21: missing field" in capsys.readouterr().err
    assert main(["data", "--tokenizer", tokenizer]) == 2
    assert "required: SOURCE" in capsys.readouterr().err


def test_histograms_hold_every_record_of_their_axis(sources):
    reading = Reading(tokenizer=TOKENIZER, max_length=24, batch_size=4)
    cards = data_cards(weighted_sources(sources[:1]), reading)
    prompts, responses, fits, difference, *_ = card_charts(cards, 24, 4, ["pairs"])
    for chart in (prompts, responses):
        for one in chart.series:
            assert sum(one.y) / 2 == pytest.approx(1, abs=0.06)  # each step has two corners
    assert [one.label for one in responses.series] == ["chosen", "rejected"]
    curve = fits.series[0]
    assert curve.y[-1] == 1
    assert list(curve.x) == sorted(curve.x)
    assert len(difference.series) == 2


def test_a_long_part_keeps_both_ends():
    text = "begin " + "x" * 5000 + " end"
    assert shortened(text).startswith("begin")
    assert shortened(text).endswith("end")
    assert len(shortened(text)) < 800
    assert shortened("short") == "short"
