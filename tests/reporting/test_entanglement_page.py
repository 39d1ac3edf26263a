"""Cells of the page of `jaxalign entangle`."""

import pytest

from jaxalign.reporting.entanglement_page import COLOURS, LossRow


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(2.4e17, "∞"), (float("inf"), "∞"), (-3e9, "-∞"), (1.0, "1"), (2.345, "2.35")],
)
def test_a_ratio_to_a_remainder_of_rounding_is_infinite(ratio, said):
    shares = dict(zip(COLOURS, (0.25, 0.0, 0.0, 0.75, 0.0), strict=True))
    row = LossRow(name="ipo", fractions=shares, in_band=0.0, ratio=ratio, negative=0)
    assert row.cells(["ideal", "reversed", "d_w/d_l"]) == ["25%", "75%", said]
