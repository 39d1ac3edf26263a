"""The page of `jaxalign judge`: tables and examples in one HTML file that fetches nothing."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.better { border-left: 4px solid #4c9f70; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem;
      font-size: 12px; margin: .3rem 0; max-height: 30rem; overflow-y: auto; }
article { border-top: 1px solid #ddd; padding: .5rem 0 1rem; }
small { color: #666; }
"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    shades: Sequence[Sequence[float]] | None = None
    """Of each cell after a row's first: a share that is green above a half and red below; NaN is
    left white."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Points with their intervals, one a line."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A comparison to read."""

    facts: str
    prompt: str
    names: tuple[str, str]
    responses: tuple[str, str]
    better: int | None
    """Which side won."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Comparisons that have something in common."""

    title: str
    note: str
    examples: Sequence[Example]


def write_page(
    title: str, facts: Sequence[str], parts: Sequence[Table | Intervals | Examples], path: Path
) -> None:
    """Write the page.

    Args:
      title: its heading.
      facts: lines under it.
      parts: in their order.
      path: of the HTML file.
    """
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>" + "<br>".join(map(html.escape, facts)) + "</p>",
    ]
    for part in parts:
        match part:
            case Table():
                body.append(_table(part))
            case Intervals():
                body.append(_intervals(part))
            case Examples():
                body.append(_examples(part))
    write_text(
        path,
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n",
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = ""
    for number, row in enumerate(table.rows):
        shades = [math.nan, *(table.shades[number] if table.shades else [math.nan] * len(row))]
        cells = zip(row, shades, strict=False)
        rows += "<tr>" + "".join(f"<td{_shade(s)}>{html.escape(x)}</td>" for x, s in cells)
        rows += "</tr>"
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}"
        f"<div class='scroll'><table><tr>{head}</tr>{rows}</table></div>"
    )


def _shade(share: float) -> str:
    if not math.isfinite(share):
        return ""
    colour = "76,159,112" if share > 0.5 else "196,78,82"
    return f" style='background:rgba({colour},{min(1.0, 2 * abs(share - 0.5)):.2f})'"


def _intervals(part: Intervals) -> str:
    """Points and bars as a drawing of lines."""
    lowest, highest = min(part.low), max(part.high)
    span = (highest - lowest) or 1.0
    left = 24 + 8 * max(map(len, part.labels))  # pixels, for letters of 13
    width, step = 560, 24

    def x(value: float) -> float:
        return left + width * (value - lowest) / span

    lines = []
    for number, label in enumerate(part.labels):
        y = step * (number + 0.5)
        value, low, high = part.values[number], part.low[number], part.high[number]
        lines.append(
            f"<text x='{left - 12}' y='{y + 4}' text-anchor='end'>{html.escape(label)}</text>"
            f"<line x1='{x(low):.1f}' x2='{x(high):.1f}' y1='{y}' y2='{y}' stroke='#4c72b0' "
            f"stroke-width='2'/><circle cx='{x(value):.1f}' cy='{y}' r='4' fill='#4c72b0'>"
            f"<title>{value:.0f} ({low:.0f} to {high:.0f})</title></circle>"
        )
    height = step * (len(part.labels) + 1)
    lines.append(
        f"<text x='{left}' y='{height - 6}'>{lowest:.0f}</text>"
        f"<text x='{left + width}' y='{height - 6}' text-anchor='end'>{highest:.0f}</text>"
    )
    return (
        f"<h2>{html.escape(part.title)}</h2><svg viewBox='0 0 {left + width + 20} {height}' "
        f"font-size='13' role='img' style='max-width:{left + width + 20}px'>{''.join(lines)}</svg>"
    )


def _examples(part: Examples) -> str:
    if not part.examples:
        return ""
    return (
        f"<h2>{html.escape(part.title)}</h2><p>{html.escape(part.note)}</p>"
        f"{''.join(map(_example, part.examples))}"
    )


def _example(example: Example) -> str:
    sides = ""
    for side in (0, 1):
        mark = " class='better'" if side == example.better else ""
        sides += (
            f"<div><b>{html.escape(example.names[side])}</b>"
            f"<pre{mark}>{html.escape(example.responses[side]) or '<i>empty</i>'}</pre></div>"
        )
    return (
        f"<article><small>{html.escape(example.facts)}</small>"
        f"<pre>{html.escape(example.prompt[-2000:])}</pre>"
        f"<div class='sides'>{sides}</div></article>"
    )
