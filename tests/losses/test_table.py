"""The table of losses is complete, and its page is the one that the code writes."""

from pathlib import Path

import pytest

from jaxalign.losses import LOSSES, PREFERENCE_LOSSES
from jaxalign.losses.table import PARSER, losses_markdown, losses_table, section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_the_page_is_current():
    assert PAGE.read_text() == losses_markdown(), (
        "docs/losses.md is stale: python -m jaxalign.losses.table > docs/losses.md"
    )


@pytest.mark.parametrize("row", losses_table("pairs", "policy_pairs"), ids=lambda row: row.name)
def test_a_row_says_formula_slopes_and_source(row):
    assert row.formula.startswith(r"\ell")
    assert row.slopes
    assert row.arxiv
    assert all("|" not in cell for cell in (row.formula, row.definitions, row.slopes))
    assert row.summary.endswith(".")


def test_one_row_for_each_loss_in_their_order():
    assert [row.name for row in losses_table("pairs", "policy_pairs")] == list(PREFERENCE_LOSSES)


def test_dpo_reads_as_written():
    row = losses_table("pairs")[0]
    assert row.name == "dpo"
    assert row.formula == (
        r"\ell = -(1-\epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h)"
    )
    assert row.definitions.startswith("h = ")
    assert row.defaults == {"beta": "0.1", "label_smoothing": "0"}
    assert row.hyperparameters == "beta=0.1, label_smoothing=0"
    assert row.slopes == "1"
    assert row.arxiv == ("2305.18290",)


def test_a_section_ends_where_the_next_begins():
    documentation = PARSER.parse("Sum.\n\nSlopes:\n  one\n  two\n\nReferences:\n  three\n")
    assert section(documentation, "slopes") == "one two"
    assert section(documentation, "references") == "three"
    assert section(documentation, "raises") == ""


def test_every_loss_is_on_the_page_and_names_are_unique():
    names = [loss.name for loss in LOSSES]
    assert len(set(names)) == len(names)
    page = losses_markdown()
    assert all(f"| `{name}`" in page for name in names)
