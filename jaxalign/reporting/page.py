"""Pages that need no other file: parts in order, one template, one stylesheet, one script.

A part is a dataclass with a `template`, the name of a file in `templates/`, which shows it. All
values are escaped: prompts and responses are data.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from jaxalign.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment


@runtime_checkable
class Part(Protocol):
    """A section of a page."""

    template: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, or a list."""

    template: ClassVar[str] = "text.html"
    title: str = ""
    lines: Sequence[str]
    bullets: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header."""

    template: ClassVar[str] = "table.html"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    shades: Sequence[Sequence[float]] | None = None
    """For each cell after a row's first, a number from 0 to 1: green above a half, red below, and
    no colour where it is NaN."""
    words: Collection[int] = (0,)
    """Columns that are aligned to the left."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Responses to the same prompt."""

    facts: str
    prompt: str
    names: Sequence[str]
    responses: Sequence[str]
    better: int | None
    """Index of the response that won."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Responses that have something in common."""

    template: ClassVar[str] = "examples.html"
    title: str
    note: str
    examples: Sequence[Example]


def write_page(title: str, facts: Sequence[str], parts: Sequence[Part], path: Path) -> None:
    """Write the page.

    Args:
      title: its heading.
      facts: lines under it.
      parts: in their order.
      path: of the HTML file.
    """
    template = _environment().get_template("page.html")
    write_text(path, template.render(title=title, facts=facts, parts=parts))


@functools.cache
def _environment() -> "Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxalign.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shade"] = _shade
    environment.globals["zip"] = zip
    return environment


def _shade(fraction: float) -> str:
    """The background of a cell, as CSS; empty for NaN."""
    if fraction != fraction:
        return ""
    colour = "76,159,112" if fraction > 0.5 else "196,78,82"
    return f"background:rgba({colour},{min(1.0, 2 * abs(fraction - 0.5)):.2f})"
