"""Charts as SVG: points where their values are, and the values that the script shows."""

import itertools
import math

import pytest
from PIL import Image

from jaxalign.reporting.charts import GREY, Chart, Series, draw, view


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3e-5, 2e-5), (1e6, 1.5e7), (0.4, 0.41), (-120.0, -3.0), (5, 5)]
)
def test_ticks_are_round_ordered_and_inside(low, high):
    shown = view(Chart(title="t", series=[Series(x=[0, 1], y=[low, high])]))
    values = [float(text) for _, text in shown.y_ticks]
    assert 3 <= len(values) <= 9
    assert values == sorted(set(values))
    assert all(shown.top - 0.1 <= at <= shown.bottom + 0.1 for at, _ in shown.y_ticks)
    gaps = [b - a for a, b in itertools.pairwise(values)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    digit = gaps[0] / 10 ** math.floor(math.log10(gaps[0]) + 1e-9)
    assert min(abs(digit - x) for x in (1, 2, 2.5, 5, 10)) < 1e-6


def test_a_point_lies_between_ticks_as_its_value_does():
    shown = view(Chart(title="t", series=[Series(x=[0, 10], y=[0.0, 1.0])]))
    x, y = shown.values["series"][0]["at"][0]
    ticks = {float(text): at for at, text in shown.x_ticks}
    heights = {float(text): at for at, text in shown.y_ticks}
    assert (x, y) == pytest.approx((ticks[0], heights[0]), abs=0.06)
    middle = view(Chart(title="t", series=[Series(x=[0, 5, 10], y=[0.0, 0.2, 1.0])]))
    x, y = middle.values["series"][0]["at"][1]
    assert x == pytest.approx((ticks[0] + ticks[10]) / 2, abs=0.1)
    assert y == pytest.approx(heights[0] + 0.2 * (heights[1] - heights[0]), abs=0.1)


def test_equal_factors_are_equal_distances_on_a_logarithmic_axis():
    chart = Chart(
        title="t", log_x=True, series=[Series(kind="points", x=[0.25, 1, 16], y=[0, 1, 2])]
    )
    (a, _), (b, _), (c, _) = view(chart).values["series"][0]["at"]
    assert (c - b) == pytest.approx(2 * (b - a), abs=0.2)


def test_numbers_that_are_not_finite_leave_a_gap_and_guides_have_no_values():
    nan = float("nan")
    chart = Chart(
        title="t",
        series=[
            Series(x=range(5), y=[0.0, 1.0, nan, 2.0, 3.0], dots=True),
            Series(x=[0, 4], y=[1, 1], colour=GREY),
        ],
    )
    shown = view(chart)
    assert [len(points.split()) for points in shown.marks[0].paths] == [2, 2]
    assert len(shown.marks[0].dots) == 4
    (values,) = shown.values["series"]
    assert values["y"] == [0.0, 1.0, None, 2.0, 3.0]
    assert values["at"][2] is None
    assert view(Chart(title="empty", series=[Series(x=[], y=[])])).marks[0].paths == []


def test_stacked_parts_end_where_the_next_ones_begin():
    base = [0.0, 0.0]
    parts = []
    for heights in ([0.25, 0.5], [0.75, 0.5]):
        parts.append(Series(kind="area", x=[0, 1], y=heights, base=base))
        base = parts[-1].ends()
    assert base == [1.0, 1.0]
    lower, upper = (mark.paths[0].split() for mark in view(Chart(title="t", series=parts)).marks)
    assert lower[:2] == upper[:1:-1]


def test_a_long_curve_is_thinned_on_a_page_and_says_so():
    steps = list(range(1, 2002))
    shown = view(Chart(title="t", series=[Series(x=steps, y=[float(x) for x in steps])]))
    x = shown.values["series"][0]["x"]
    assert shown.thinned
    assert len(x) <= 501
    assert (x[0], x[-1]) == (1, 2001)


def test_a_png_shows_every_kind(tmp_path):
    kinds = ("line", "area", "bars", "points")
    charts = [
        Chart(title=kind, series=[Series(kind=kind, x=[0, 1], y=[1.0, 2.0], label="a")], rule=0.5)
        for kind in kinds
    ]
    draw(charts, tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as image:
        assert image.width > 4 * 400
        panels = [image.crop((at * 440, 0, at * 440 + 440, 390)) for at in range(4)]
        assert len({panel.tobytes() for panel in panels}) == 4
