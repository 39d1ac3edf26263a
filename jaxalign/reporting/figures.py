"""Figures on disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxalign.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
