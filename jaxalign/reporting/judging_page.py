"""What the page of `jaxalign judge` shows besides tables and examples: intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxalign.reporting.page import Example, Examples, Table, write_page

__all__ = ["Example", "Examples", "Intervals", "Table", "write_page"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A point and its interval, in pixels."""

    label: str
    text: str
    y: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class View:
    """Intervals in pixels, for the template."""

    lines: Sequence[Line]
    left: int
    width: int
    height: int
    lowest: str
    highest: str


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Points with their intervals, one a line."""

    template: ClassVar[str] = "intervals.html"
    title: str
    labels: Sequence[str]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def view(self) -> View:
        """The intervals as SVG."""
        lowest, highest = min(self.low), max(self.high)
        span = (highest - lowest) or 1.0
        left = 24 + 8 * max(map(len, self.labels))  # pixels, for letters of 12
        width, step = 560, 24

        def x(value: float) -> float:
            return left + width * (value - lowest) / span

        points = zip(self.labels, self.values, self.low, self.high, strict=True)
        lines = [
            Line(
                label=label,
                text=f"{value:.0f} ({low:.0f} to {high:.0f})",
                y=step * (number + 0.5),
                value=x(value),
                low=x(low),
                high=x(high),
            )
            for number, (label, value, low, high) in enumerate(points)
        ]
        return View(
            lines=lines,
            left=left,
            width=left + width + 20,
            height=step * (len(lines) + 1),
            lowest=f"{lowest:.0f}",
            highest=f"{highest:.0f}",
        )
