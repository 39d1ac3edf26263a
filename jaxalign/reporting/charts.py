"""Charts, described once and drawn twice: as PNG by matplotlib and as SVG on a page."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxalign.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PlotFigure

Number = int | float
Numbers = Sequence[int | float]
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
"""Of the first, second, ... run; matplotlib's own."""
WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 400, 250, 12, 10, 40
"""Size and margins of an SVG, in units of its view box."""
MOST_POINTS = 500
"""Points of a curve on a page; longer curves are thinned evenly."""


def colour(index: int) -> str:
    """The colour of a run."""
    return COLOURS[index % len(COLOURS)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together."""

    x: Numbers
    y: Numbers
    label: str = ""
    """In the legend; without one it is not listed there."""
    kind: Literal["line", "area", "bars", "points"] = "line"
    colour: str = COLOURS[0]
    dashed: bool = False
    faint: bool = False
    """A thin, pale line: the noisy loss of training beside the held-out one."""
    dots: bool = False
    """A line with a dot at each point."""
    base: Numbers = ()
    """Where areas and bars begin; they end at `base + y`."""
    width: Number = 0.8
    """Of a bar, in units of x."""
    links: Sequence[str] = ()
    """On a page, where a click on a point leads."""

    def ends(self) -> list[Number]:
        """The upper ends: y itself, or base + y."""
        return [y + b for y, b in itertools.zip_longest(self.y, self.base, fillvalue=0.0)]

    def bases(self) -> Numbers:
        """The lower ends of areas and bars."""
        return self.base or [0.0] * len(self.y)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series on the same axes."""

    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = ""
    rule: Number | None = None
    """A grey horizontal line at this height."""
    y_range: tuple[Number, Number] | None = None
    log_x: bool = False
    x_names: Sequence[str] = ()
    """Names of x = 0, 1, ..., in place of numbers."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Charts side by side."""

    template: ClassVar[str] = "figure.html"
    title: str = ""
    note: str = ""
    charts: Sequence[Chart]
    image: str = ""
    """File name of the PNG that shows the same."""
    alt: str = ""
    folded: bool = False
    """Whether a page shows only the title until it is opened, and a field that selects charts."""

    def views(self) -> list["View"]:
        """The charts as SVG."""
        return [view(chart) for chart in self.charts]


def save_figure(figure: "PlotFigure", path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")


def draw(
    charts: Sequence[Chart],
    path: Path,
    *,
    size: tuple[float, float] = (4.0, 3.6),
    columns: int | None = None,
) -> None:
    """Write charts side by side as one PNG.

    Args:
      charts: what is drawn.
      path: of the PNG.
      size: width and height of one chart, in inches.
      columns: largest number of charts side by side; None: all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(columns or len(charts), len(charts))
    high = -(-len(charts) // wide)
    figure, axes = plt.subplots(
        high, wide, figsize=(size[0] * wide, size[1] * high), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(charts) :]:
        axis.axis("off")
    for axis, chart in zip(axes.flat, charts, strict=False):
        for one in chart.series:
            _draw_series(axis, one)
        if chart.rule is not None:
            axis.axhline(chart.rule, color="grey", linewidth=0.8)
        axis.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        axis.title.set_fontsize(10 if len(chart.title) > 40 else 12)
        if not chart.x_names:
            axis.grid(alpha=0.3)
        if chart.log_x:
            axis.set_xscale("log")
        if chart.x_names:
            many = len(chart.x_names) > 6
            slanted: Any = {"ha": "right", "rotation_mode": "anchor"} if many else {}
            plain: Any = {"fontsize": 8, "parse_math": False}  # a token may be a dollar sign
            plain["rotation"] = 40 if many else 20 if len(chart.x_names) > 2 else 0
            axis.set_xticks(range(len(chart.x_names)), chart.x_names, **plain, **slanted)
        if chart.y_range is not None:
            axis.set_ylim(*chart.y_range)
        if any(one.label for one in chart.series):
            axis.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


def _draw_series(axis: Any, one: Series) -> None:
    style = {"color": one.colour, "label": one.label or "_nolegend_"}
    match one.kind:
        case "line":
            axis.plot(
                one.x,
                one.y,
                linestyle="--" if one.dashed else "-",
                marker="." if one.dots else None,
                linewidth=0.8 if one.faint else 1.5,
                alpha=0.6 if one.faint else 1.0,
                **style,
            )
        case "area":
            axis.fill_between(one.x, one.bases(), one.ends(), linewidth=0, **style)
        case "bars":
            axis.bar(one.x, one.y, width=one.width, bottom=one.bases(), **style)
        case "points":
            axis.scatter(one.x, one.y, s=14, **style)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A series in units of the view box."""

    series: Series
    paths: Sequence[str] = ()
    """`points` of polylines and polygons."""
    bars: Sequence[tuple[float, float, float, float]] = ()
    """x, y, width and height."""
    dots: Sequence[tuple[float, float, str]] = ()
    """x, y and link."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A chart in units of the view box, for the template."""

    chart: Chart
    marks: Sequence[Mark]
    left: Number
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    rule: float | None
    thinned: bool
    values: dict[str, Any] = field(repr=False)
    """What the script shows under the pointer: scale and points of every series."""
    width: int = WIDTH
    height: int = HEIGHT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def view(chart: Chart) -> View:
    """A chart as SVG: ranges, ticks, and all points in units of the view box."""
    series = [_thinned(one) for one in chart.series]
    scale_x = math.log10 if chart.log_x else float
    xs = [scale_x(x) for one in series for x in _edges(one)]
    ys = [y for one in series for y in (*one.ends(), *one.base)]
    ys += [0.0 for one in series if one.kind in ("area", "bars")]
    ys += [] if chart.rule is None else [chart.rule]
    x_low, x_high = _range(xs, 0.03)
    y_low, y_high = chart.y_range or _range(ys, 0.06)
    y_ticks = [(y, f"{y:.6g}") for y in _ticks(y_low, y_high)]
    left = 30 + 7 * max((len(text) for _, text in y_ticks), default=1)

    def x_at(x: Number) -> float:
        return left + (WIDTH - RIGHT - left) * (scale_x(x) - x_low) / (x_high - x_low)

    def y_at(y: Number) -> float:
        return TOP + (HEIGHT - BOTTOM - TOP) * (y_high - y) / (y_high - y_low)

    if chart.x_names:
        x_ticks = [(x_at(at), name) for at, name in enumerate(chart.x_names)]
    elif chart.log_x:
        powers = range(math.ceil(x_low / math.log10(2)), math.floor(x_high / math.log10(2)) + 1)
        kept = powers[:: -(-len(powers) // 6) or 1]
        x_ticks = [(x_at(2.0**power), f"{2.0**power:.3g}") for power in kept]
    else:
        x_ticks = [(x_at(x), f"{x:.6g}") for x in _ticks(x_low, x_high)]
    return View(
        chart=chart,
        marks=[_mark(one, x_at, y_at) for one in series],
        left=left,
        x_ticks=x_ticks,
        y_ticks=[(y_at(y), text) for y, text in y_ticks],
        rule=None if chart.rule is None else y_at(chart.rule),
        thinned=any(
            len(one.x) < len(whole.x) for one, whole in zip(series, chart.series, strict=True)
        ),
        values={
            "x": chart.x_label,
            "y": chart.y_label,
            "names": list(chart.x_names),
            "series": [
                {
                    "label": one.label or chart.y_label or chart.title,
                    "colour": one.colour,
                    "points": one.kind == "points",
                    "x": _short(one.x),
                    "y": _short(one.y),
                    "at": [
                        [round(x_at(x), 1), round(y_at(end), 1)] if _finite(x, end) else None
                        for x, end in zip(one.x, one.ends(), strict=True)
                    ],
                }
                for one in series
                if one.colour != GREY
            ],
        },
    )


GREY = "grey"
"""The colour of lines that only guide the eye; they show no values."""


def _mark(one: Series, x_at: Any, y_at: Any) -> Mark:
    ends = one.ends()
    links = one.links or [""] * len(ends)
    dots = [
        (x_at(x), y_at(y), link)
        for x, y, link in zip(one.x, ends, links, strict=True)
        if _finite(x, y)
    ]
    match one.kind:
        case "points":
            return Mark(series=one, dots=dots)
        case "bars":
            bars = [
                (
                    x_at(x - one.width / 2),
                    y_at(end),
                    x_at(x + one.width / 2) - x_at(x - one.width / 2),
                    y_at(base) - y_at(end),
                )
                for x, base, end in zip(one.x, one.bases(), ends, strict=True)
            ]
            return Mark(series=one, bars=bars)
        case "area":
            upper = list(zip(one.x, ends, strict=True))
            lower = list(zip(one.x, one.bases(), strict=True))[::-1]
            return Mark(series=one, paths=[_points(upper + lower, x_at, y_at)])
    pieces = itertools.groupby(zip(one.x, ends, strict=True), key=lambda point: _finite(*point))
    paths = [_points(piece, x_at, y_at) for whole, piece in pieces if whole]
    return Mark(series=one, paths=paths, dots=dots if one.dots else ())


def _points(points: Iterable[tuple[Number, Number]], x_at: Any, y_at: Any) -> str:
    return " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)


def _edges(one: Series) -> list[Number]:
    half = one.width / 2 if one.kind == "bars" else 0.0
    return [x + side for x in one.x for side in ((-half, half) if half else (0.0,))]


def _finite(*values: Number) -> bool:
    return all(map(math.isfinite, values))


def _thinned(one: Series) -> Series:
    """Every k-th point and the last one, where a curve has more points than a page draws."""
    if len(one.x) <= MOST_POINTS or one.kind in ("bars", "points"):
        return one
    kept = [*range(0, len(one.x) - 1, -(-len(one.x) // MOST_POINTS)), len(one.x) - 1]
    some = {name: [getattr(one, name)[at] for at in kept] for name in ("x", "y")}
    return replace(one, **some, base=[one.base[at] for at in kept] if one.base else ())


def _range(values: Iterable[Number], margin: float) -> tuple[Number, Number]:
    """Lowest and highest finite value, with a margin; never empty."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    rest = margin * (high - low) or 0.5 * abs(high) or 0.5
    return low - rest, high + rest


def _ticks(low: Number, high: Number) -> list[Number]:
    """About five round numbers in a range."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= raw * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [number * step for number in numbers]


def _short(values: Iterable[Number]) -> list[Number | None]:
    """Numbers for the script, to six digits; None where they are not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
