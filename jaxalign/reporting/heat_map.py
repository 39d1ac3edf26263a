"""Heat maps of token against token: a PNG, and the colours of a table on a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.reporting.charts import save_figure


def readable(token: str) -> str:
    """A token with visible spaces and line breaks."""
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
    plain: dict[str, Any] = {"fontsize": 6, "parse_math": False}  # a token may be a dollar sign
    axis.set_xticks(range(len(rejected)), list(map(readable, rejected)), rotation=90, **plain)
    axis.set_yticks(range(len(chosen)), list(map(readable, chosen)), **plain)
    axis.set(xlabel="rejected", ylabel="chosen")
    axis.set_title(title, fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.7, label="cosine of the tokens' gradients")
    save_figure(figure, path)
    plt.close(figure)


def shade(value: float) -> str:
    """The colour of a cell, as CSS: red above zero, blue below; empty where it is not finite."""
    if not np.isfinite(value):
        return ""
    return f"rgba(var(--{'red' if value > 0 else 'blue'}),{min(1.0, abs(float(value))):.2f})"
