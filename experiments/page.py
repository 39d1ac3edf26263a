"""Pages with results: each study writes its own section of a page, and no other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student


def put(path: Path, name: str, text: str) -> None:
    """Replace the section between `<!-- name -->` and `<!-- /name -->` of a page.

    Args:
      path: Markdown file, or a folder with a README.md.
      name: of the section.
      text: its Markdown.
    """
    path = path / "README.md" if path.is_dir() else path
    whole = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, rest = whole.split(first)
    tail = rest.split(last)[1]
    path.write_text(f"{head}{first}{text.strip()}\n{last}{tail}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, text to the left and numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval around the mean of two or more seeds (Student's t)."""
    number = len(values)
    error = float(np.std(values, ddof=1)) / number**0.5
    return float(student.ppf(0.975, number - 1)) * error
