"""Heat maps of token against token: PNG, and a table for a page that needs no other file."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxalign.reporting.figures import save_figure


def readable(token: str) -> str:
    """A token as a reader sees it: spaces and line breaks have signs."""
    return token.replace("Ġ", "·").replace("▁", "·").replace("Ċ", "⏎").replace(" ", "·") or "∅"


def draw(
    values: np.ndarray, chosen: Sequence[str], rejected: Sequence[str], path: Path, *, title: str
) -> None:
    """A PNG with the chosen tokens downwards and the rejected ones to the right.

    Args:
      values: cosines, [chosen, rejected]; NaN is left white.
      chosen: the rows' tokens.
      rejected: the columns' tokens.
      path: of the PNG.
      title: above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = [1.8 + 0.17 * len(rejected), 1.4 + 0.17 * len(chosen)]
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal")
    axis.set_xticks(range(len(rejected)), list(map(readable, rejected)), rotation=90, fontsize=6)
    axis.set_yticks(range(len(chosen)), list(map(readable, chosen)), fontsize=6)
    axis.set(xlabel="rejected", ylabel="chosen")
    axis.set_title(title, fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.7, label="cosine of the tokens' gradients")
    save_figure(figure, path)
    plt.close(figure)


def table(values: np.ndarray, chosen: Sequence[str], rejected: Sequence[str]) -> str:
    """The same as an HTML table; a cell tells its value to the pointer."""

    def cell(value: float, row: str, column: str) -> str:
        if not np.isfinite(value):
            return "<td></td>"
        share = min(1.0, abs(float(value)))
        fade = round(255 * (1 - share))
        colour = f"rgb(255,{fade},{fade})" if value > 0 else f"rgb({fade},{fade},255)"
        words = html.escape(f"{row} × {column}: {value:.3f}", quote=True)
        return f'<td style="background:{colour}" title="{words}"></td>'

    columns, rows = ([readable(token) for token in side] for side in (rejected, chosen))
    head = "".join(f"<th><span>{html.escape(column)}</span></th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(row)}</th>"
        + "".join(cell(float(values[i, j]), row, column) for j, column in enumerate(columns))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<table class="heat"><tr><th></th>{head}</tr>{body}</table>'


def inline(figure: object) -> str:
    """A matplotlib figure as an <img> that holds its own data."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, format="png")  # pyright: ignore[reportAttributeAccessIssue]
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/png;base64,{data}">'
