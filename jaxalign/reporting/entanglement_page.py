"""The page of `jaxalign entangle`: one HTML file, and its figures as PNG."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxalign.entanglement.measurements import HeatMap, LossRow, PairRow
from jaxalign.reporting import heat_map
from jaxalign.reporting.charts import GREY, Chart, Figure, Series, draw
from jaxalign.reporting.entanglement import CASES
from jaxalign.reporting.ledger import StepLedger, step_parts
from jaxalign.reporting.page import Table
from jaxalign.reporting.page import write_page as write_parts

COLOURS = {label: colour for colour, label in CASES.values()}
MEANINGS = {
    "ideal": "chosen up, rejected down: the aim of the loss",
    "both down": "the rejected gradient decreases the chosen response with it",
    "both up": "the chosen gradient increases the rejected response with it",
    "reversed": "chosen down, rejected up: the loss has passed its target",
    "undefined": "a gradient or both coefficients are zero, or not a number",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of the page."""

    model: str
    data: str
    loss: str
    left_out: Sequence[str]
    pairs: Sequence[PairRow]
    losses: Sequence[LossRow]
    heat_maps: Sequence[HeatMap]
    heat_map_parameters: str = "all parameters"
    """The parameters whose gradients the heat maps compare."""
    ledger: StepLedger | None = None
    """Where the changes of one update come from; None: not computed."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The list of pairs; each opens with its texts, its numbers and its heat map, if it has one."""

    template: ClassVar[str] = "pairs.html"
    title: str
    note: str
    loss: str
    pairs: Sequence[PairRow]
    heat_maps: Mapping[int, HeatMap]
    """By the index of the pair."""
    colours: ClassVar[Mapping[str, str]] = COLOURS

    def cases(self) -> list[str]:
        """The cases that occur."""
        present = {pair.case for pair in self.pairs}
        return [case for case in COLOURS if case in present]

    def columns(self) -> list[str]:
        """The numbers that the list shows and filters by."""
        return list(self.values(self.pairs[0])) if self.pairs else []

    def values(self, pair: PairRow) -> dict[str, float]:
        """Cosine, ratio of norms, tokens of both responses, and loss."""
        numbers = pair.numbers
        return {
            "cosine": numbers["cosine"],
            "ratio": numbers["norm_ratio"],
            "length": numbers["length_chosen"] + numbers["length_rejected"],
            "loss": numbers["loss"],
        }

    def cells(self, at: int) -> tuple[list[str], list[str], list[list[tuple[str, str]]]]:
        """A heat map: names of its rows and columns, and the colour and value of each cell."""
        shown = self.heat_maps[at]
        rows, columns = (
            [heat_map.readable(token) for token in side] for side in (shown.chosen, shown.rejected)
        )
        cells = [[(heat_map.shade(x), f"{x:.3f}") for x in row] for row in shown.cosines.tolist()]
        return rows, columns, cells

    def facts(self, pair: PairRow) -> str:
        """One line on a pair."""
        numbers = pair.numbers
        return (
            f"{pair.case} under {self.loss}; cosine {numbers['cosine']:.3f}; "
            f"‖g_w‖ {numbers['norm_chosen']:.3g}, ‖g_l‖ {numbers['norm_rejected']:.3g}; "
            f"CHES {numbers['ches']:.3g}, length-normalised {numbers['ln_ches']:.3g}; "
            f"edit similarity {numbers['edit']:.2f}"
        )


def write_page(page: Page, folder: Path) -> Path:
    """Write `index.html` and the figures.

    Returns:
      The path of the page.
    """
    overview = Figure(charts=overview_charts(page.pairs), image="overview.png")
    draw(overview.charts, folder / overview.image, size=(5.0, 3.6))
    for shown in page.heat_maps:
        row = page.pairs[shown.pair]
        title = f"cosine {row.numbers['cosine']:.3f}, {row.case}"
        path = folder / f"heat_map_{shown.pair}.png"
        heat_map.draw(shown.cosines, shown.chosen, shown.rejected, path, title=title)
    ledger_parts = [] if page.ledger is None else step_parts(page.ledger)
    for part in ledger_parts:
        if isinstance(part, Figure):
            draw(part.charts, folder / part.image)
    names = [*COLOURS, "in band", "d_w/d_l", "negative"]
    parts = [
        Explanation(),
        _case_table(page),
        overview,
        Table(
            title="What each loss would do",
            note="For a gradient step on each pair alone, to first order, with the loss's default "
            "hyperparameters. In band: d_w / d_l (its median is shown) lies where the step is "
            "ideal. Negative: pairs where a coefficient has the wrong sign.",
            header=["loss", *names],
            rows=[[row.name, *row.cells(names)] for row in page.losses],
        ),
        *ledger_parts,
        Pairs(
            title="Pairs",
            note="Choose a pair to read it. The most and the least entangled ones have a heat map "
            "of token against token: red where the gradients of the two tokens point the same way, "
            "so that decreasing the rejected token also decreases the chosen one; blue where they "
            f"oppose each other, as they should. Over {page.heat_map_parameters}; the "
            "pointer on a cell shows the cosine.",
            loss=page.loss,
            pairs=page.pairs,
            heat_maps={shown.pair: shown for shown in page.heat_maps},
        ),
    ]
    facts = [f"model {page.model}", f"data {page.data}", f"loss {page.loss}", *page.left_out]
    path = folder / "index.html"
    write_parts(f"Gradient entanglement of {len(page.pairs)} pairs", facts, parts, path)
    return path


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What entanglement is, in formulas."""

    template: ClassVar[str] = "explanation.html"


def _case_table(page: Page) -> Table:
    cases = Counter(row.case for row in page.pairs)
    return Table(
        title=f"Cases under {page.loss}",
        header=["case", "pairs", "fraction", "meaning"],
        rows=[
            [name, str(cases[name]), f"{cases[name] / len(page.pairs):.0%}", meaning]
            for name, meaning in MEANINGS.items()
            if cases[name] or name in ("ideal", "both down", "both up")
        ],
        words=(0, 3),
    )


def overview_charts(pairs: Sequence[PairRow]) -> list[Chart]:
    """How many pairs have which cosine, and cosine over the ratio of norms by case."""
    cosines = np.array([row.numbers["cosine"] for row in pairs])
    ratios = np.array([row.numbers["norm_ratio"] for row in pairs])
    known = cosines[np.isfinite(cosines)]
    heights, edges = np.histogram(known, bins=np.linspace(min(-0.2, known.min(initial=0)), 1, 31))
    histogram = Series(
        kind="bars",
        colour="#4c72b0",
        x=((edges[1:] + edges[:-1]) / 2).tolist(),
        y=heights.tolist(),
        width=float(edges[1] - edges[0]),
    )
    ratio = np.geomspace(1 / 16, 16, 200)
    bound = Series(
        colour=GREY, x=ratio.tolist(), y=np.minimum(ratio, 1 / ratio).tolist(), faint=True
    )
    by_case = []
    for name, colour in COLOURS.items():
        of_case = [at for at, row in enumerate(pairs) if row.case == name and ratios[at] > 0]
        if of_case:
            by_case.append(
                Series(
                    kind="points",
                    colour=colour,
                    label=name,
                    x=ratios[of_case].tolist(),
                    y=cosines[of_case].tolist(),
                    links=[f"#pair-{at}" for at in of_case],
                )
            )
    return [
        Chart(
            title="How entangled",
            series=[histogram],
            x_label="cosine of the two gradients",
            y_label="pairs",
        ),
        Chart(
            title="Ideal for equal coefficients (DPO): below the line",
            series=[bound, *by_case],
            x_label="‖g_l‖ / ‖g_w‖",
            y_label="cosine",
            log_x=True,
        ),
    ]
