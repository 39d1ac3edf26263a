"""Tables in the terminal fit its width, and no number is broken."""

import pytest

from jaxalign.cli import main
from jaxalign.reporting.terminal import fitting, print_table

NAMES = [f"run-with-a-long-name-{number}" for number in range(9)]


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_in_one_piece_and_every_run_somewhere(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    values = [f"-{number}92.617 ± 0.25" for number in range(9)]
    print_table(["", *NAMES], [["chosen log-prob (nats)", *values]])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    for number in range(9):
        assert f"-{number}92.617" in printed
    assert printed.count("chosen") == len(fitting(["", *NAMES], [["chosen", *values]], width))


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (
            ["loss", "undefined", "ideal", "both down", "both up", "reversed", "d_w/d_l"],
            ["stable_alignment", "0%", "100%", "0%", "0%", "0%", "127"],
        ),
        (
            ["Win rates", "win rate", "95% interval", "Wilson's", "won/tied/lost", "equal length"],
            [
                "A over B",
                "0.667",
                "0.000 – 1.000",
                "0.208 – 0.939",
                "2/0/1",
                "0.862 (0.015 – 0.997)",
            ],
        ),
    ],
)
def test_a_table_whose_columns_need_the_whole_line_loses_no_digit(header, row, monkeypatch, capsys):
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(header, [row])
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= width
        assert all(word in printed for cell in row for word in cell.split())


def test_a_table_that_fits_is_one_table():
    assert fitting(["loss", "a", "b"], [["dpo", "1", "2"]], 80) == [(0, 1, 2)]
    assert fitting(["loss"], [["dpo"]], 80) == [(0,)]


def test_the_losses_at_eighty_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
