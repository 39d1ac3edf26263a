"""The page of `jaxalign entangle`: one HTML file that explains itself, and its figures as PNG."""

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxalign.entanglement.measurements import HeatMap, LossRow, PairRow
from jaxalign.files import write_text
from jaxalign.reporting import heat_map
from jaxalign.reporting.figures import save_figure

COLOURS = {
    "ideal": "#4c9f70",
    "both down": "#c44e52",
    "both up": "#dd8452",
    "reversed": "#8172b3",
    "undefined": "#cccccc",
}
MEANINGS = {
    "ideal": "chosen up, rejected down: what the loss is for",
    "both down": "the rejected gradient drags the chosen response down with it",
    "both up": "the chosen gradient lifts the rejected response with it",
    "reversed": "chosen down, rejected up: the loss has passed its target",
    "undefined": "a gradient or both coefficients are zero, or not a number",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
.heat td { width: 13px; min-width: 13px; height: 13px; padding: 0; border: 1px solid #f4f4f4; }
.heat th { font: 10px monospace; padding: 0 3px; border: 0; text-align: right; }
.heat th span { writing-mode: vertical-rl; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .5rem; font-size: 12px; }
img { max-width: 100%; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that is shown."""

    model: str
    data: str
    loss: str
    left_out: Sequence[str]
    pairs: Sequence[PairRow]
    losses: Sequence[LossRow]
    heat_maps: Sequence[HeatMap]
    heat_map_parameters: str = "all parameters"
    """Whose gradients the heat maps compare."""


def write_page(page: Page, folder: Path) -> Path:
    """Write `index.html` and the figures.

    Returns:
      The path of the page.
    """
    body = [
        f"<h1>Gradient entanglement of {len(page.pairs)} pairs</h1>",
        _facts(page),
        _explanation(),
        _overview(page, folder),
        "<h2>What each loss would do</h2>",
        "<p>For a gradient step on each pair alone, to first order, with the loss's default "
        "hyperparameters. <i>In band</i>: d_w / d_l (its median is shown) lies where the step is "
        "ideal. <i>Negative</i>: "
        "pairs where a coefficient has the wrong sign.</p>",
        _loss_table(page),
        "<h2>Most and least entangled pairs</h2>",
        "<p>Red: the two tokens' gradients point the same way, so pushing the rejected token down "
        "pulls the chosen one down. Blue: they oppose each other, which is what one wants. Over "
        f"{page.heat_map_parameters}; the pointer on a cell shows the cosine.</p>",
        *(_pair(page, shown, folder) for shown in page.heat_maps),
    ]
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>Gradient entanglement</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    path = folder / "index.html"
    write_text(path, text)
    return path


def _facts(page: Page) -> str:
    lines = [f"model {page.model}", f"data {page.data}", f"loss {page.loss}", *page.left_out]
    return "<p>" + "<br>".join(map(html.escape, lines)) + "</p>"


def _explanation() -> str:
    return (
        "<p>A preference loss wants the log-prob of the chosen response up and that of the "
        "rejected one down. A step moves along d<sub>w</sub> g<sub>w</sub> − d<sub>l</sub> "
        "g<sub>l</sub>: the two log-probs' gradients g, times what the loss weighs them with. To "
        "first order the chosen log-prob changes by d<sub>w</sub>‖g<sub>w</sub>‖² − "
        "d<sub>l</sub>⟨g<sub>w</sub>, g<sub>l</sub>⟩ and the rejected one by "
        "d<sub>w</sub>⟨g<sub>w</sub>, g<sub>l</sub>⟩ − d<sub>l</sub>‖g<sub>l</sub>‖²: the inner "
        "product is the entanglement. Where it is large against one of the norms, both "
        "log-probs move the same way.</p>"
    )


def _overview(page: Page, folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cosines = np.array([row.numbers["cosine"] for row in page.pairs])
    ratios = np.array([row.numbers["norm_ratio"] for row in page.pairs])
    cases = Counter(row.case for row in page.pairs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    known = cosines[np.isfinite(cosines)]
    left.hist(known, bins=np.linspace(min(-0.2, known.min(initial=0)), 1, 31), color="#4c72b0")
    left.set(xlabel="cosine of the two gradients", ylabel="pairs", title="How entangled")
    for name, colour in COLOURS.items():
        of_case = np.array([row.case == name for row in page.pairs])
        if of_case.any():
            right.scatter(ratios[of_case], cosines[of_case], s=14, color=colour, label=name)
    curve = np.geomspace(1 / 16, 16, 200)
    right.plot(curve, np.minimum(curve, 1 / curve), color="grey", linewidth=0.8)
    right.set(
        xscale="log",
        xlabel="‖g_l‖ / ‖g_w‖",
        ylabel="cosine",
        title="Ideal for equal coefficients (DPO): below the line",
    )
    right.legend(fontsize=8)
    save_figure(figure, folder / "overview.png")
    image = heat_map.inline(figure)
    plt.close(figure)
    rows = "".join(
        f"<tr><td>{name}</td><td>{cases[name]}</td><td>{cases[name] / len(page.pairs):.0%}</td>"
        f"<td style='text-align:left'>{meaning}</td></tr>"
        for name, meaning in MEANINGS.items()
        if cases[name] or name in ("ideal", "both down", "both up")
    )
    return f"<h2>Cases under {html.escape(page.loss)}</h2><table>{rows}</table>{image}"


def _loss_table(page: Page) -> str:
    names = [*COLOURS, "in band", "d_w/d_l", "negative"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["loss", *names])
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in [row.name, *row.cells(names)])
        for row in page.losses
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{rows}</table></div>"


def _pair(page: Page, shown: HeatMap, folder: Path) -> str:
    row = page.pairs[shown.pair]
    numbers = row.numbers
    name = f"heat_map_{shown.pair}.png"
    title = f"cosine {numbers['cosine']:.3f}, {row.case}"
    heat_map.draw(shown.cosines, shown.chosen, shown.rejected, folder / name, title=title)
    facts = (
        f"{row.case} under {page.loss}; cosine {numbers['cosine']:.3f}; "
        f"‖g_w‖ {numbers['norm_chosen']:.3g}, ‖g_l‖ {numbers['norm_rejected']:.3g}; "
        f"CHES {numbers['ches']:.3g}, length-normalised {numbers['ln_ches']:.3g}; "
        f"edit similarity {numbers['edit']:.2f}"
    )
    cut = "<p>Only the first tokens of each response are shown.</p>" if shown.cut else ""
    texts = "".join(
        f"<p>{label}</p><pre>{html.escape(text)}</pre>"
        for label, text in (
            ("prompt", row.prompt[-1000:]),
            ("chosen", row.chosen),
            ("rejected", row.rejected),
        )
    )
    return (
        f"<h3>{html.escape(row.place)}</h3><p>{html.escape(facts)}</p>{cut}<div class='scroll'>"
        f"{heat_map.table(shown.cosines, shown.chosen, shown.rejected)}</div>"
        f"<details><summary>the texts</summary>{texts}</details>"
    )
