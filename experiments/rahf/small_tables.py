"""Tables and figures of the layers and the steering of a chat model, from their rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from experiments.page import half_width, put, table
from experiments.rows import Rows
from jaxalign.evaluation import length_controlled

FOLDER = Path(__file__).parent
LABELS = {
    "short": "good against bad instruction, short",
    "paper": "good against bad instruction, the paper's",
    "control": "two instructions without a value",
    "responses": "chosen against rejected response",
}
VECTORS = {
    "responses": "mean of chosen minus rejected",
    "instructions": "mean of good minus bad instruction",
    "reps": "RePS (trained)",
    "random": "random direction",
    "responses_late": "mean of chosen minus rejected, later layer",
    "instructions_late": "mean of good minus bad instruction, later layer",
}
LENGTHS = (0.1, 0.2, 0.4, 0.6)
"""Of the added vectors, in norms of the states they are added to."""
SHOWN = 5
"""Layers whose principal components are drawn."""


def steered_layers(depth: int) -> tuple[int, int]:
    """The middle layer, and the one at two thirds of the depth."""
    return max(1, depth // 2), max(1, 2 * depth // 3)


def drawn_layers(depth: int) -> list[int]:
    """Layers that are drawn, from the first to the last."""
    return sorted({round(layer) for layer in np.linspace(1, depth, min(depth, SHOWN))})


def settings() -> list[tuple[str, str, float]]:
    """Row, vector and length of everything that is steered, the model itself first."""
    every = [("steer_none", "responses", 0.0)]
    return every + [(f"steer_{name}_{x:g}", name, x) for name in VECTORS for x in LENGTHS]


def layers_table(rows: Rows) -> str:
    """Every contrast: a probe at some layers, and what else there is at the steered layer."""
    known = {name: rows[f"layers_{name}"] for name in LABELS if f"layers_{name}" in rows}
    depth = len(next(iter(known.values()))["probe"])
    drawn, middle = drawn_layers(depth), steered_layers(depth)[0] - 1
    header = ["", *(LABELS[name] for name in known)]
    lines = []

    def add(label: str, form: str, values: Sequence[float]) -> None:
        lines.append([label, *(form.format(value) for value in values)])

    for layer in drawn:
        add(f"probe, layer {layer}", "{:.2f}", [x["probe"][layer - 1] for x in known.values()])
    best = [int(np.argmax(x["probe"])) for x in known.values()]
    values = [x["probe"][at] for x, at in zip(known.values(), best, strict=True)]
    cells = [f"{value:.2f} ({at + 1})" for value, at in zip(values, best, strict=True)]
    lines.append(["best probe (its layer)", *cells])
    for key, label in {
        "components": "probe of two components",
        "pair_first": "pairs separated, first component of differences",
        "pair_mean": "pairs separated, mean difference",
        "coherence": "coherence of differences",
        "along": "chosen has the larger projection on the mean difference",
    }.items():
        add(f"{label}, layer {middle + 1}", "{:.2f}", [x[key][middle] for x in known.values()])
    sizes = [x["norm"][middle] / x["state_norm"][middle] for x in known.values()]
    add(f"norm of the mean difference, of states, layer {middle + 1}", "{:.3f}", sizes)
    best = [int(np.argmax(x["along"])) for x in known.values()]
    values = [x["along"][at] for x, at in zip(known.values(), best, strict=True)]
    cells = [f"{value:.2f} ({at + 1})" for value, at in zip(values, best, strict=True)]
    lines.append(["larger projection of chosen, at best (its layer)", *cells])
    return table(header, lines)


ROWS_DRAWN = (
    ("short", "states", "states under two\ninstructions"),
    ("short", "pairs", "the same, less the\nmean of both"),
    ("responses", "pairs", "two responses, less\nthe mean of both"),
)
"""Contrast, points and label of the lines of the figure."""


def layers_figure(rows: Rows) -> None:
    """Principal components of some layers, and probes over layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = {name: rows[f"layers_{name}"] for name in LABELS if f"layers_{name}" in rows}
    depth = len(next(iter(known.values()))["probe"])
    drawn = drawn_layers(depth)
    figure = plt.figure(figsize=(11, 10.5), layout="constrained")
    upper: Any
    lower: Any
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.7, 1), squeeze=False)[:, 0]
    axes = upper.subplots(len(ROWS_DRAWN), len(drawn))
    for line, (name, points, label) in zip(axes, ROWS_DRAWN, strict=True):
        if name not in known:
            continue
        sides = ("chosen", "rejected") if name == "responses" else ("good", "bad")
        for axis, layer in zip(line, drawn, strict=True):
            both = known[name]["drawn"][str(layer)][points]
            for side, of_side, colour in zip(both, sides, ("C0", "C3"), strict=True):
                axis.scatter(*np.array(side).T, s=5, color=colour, label=of_side)
            key = "explained" if points == "states" else "pair_explained"
            axis.set_title(f"layer {layer}: {known[name][key][layer - 1]:.0%}", fontsize=9)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=9)
        line[0].legend(fontsize=7)
    left, right = lower.subplots(1, 2)
    layers = np.arange(1, depth + 1)
    for number, (name, row) in enumerate(known.items()):
        look = {"color": f"C{number}", "label": LABELS[name]}
        left.plot(layers, row["probe"], **look)
        left.plot(layers, row["components"], color=f"C{number}", linestyle=":")
        right.plot(layers, row["along"], **look)
    left.set_title("held-out accuracy of a probe (dotted: of two components)", fontsize=9)
    right.set_title("chosen has the larger projection on the mean difference", fontsize=9)
    for axis in (left, right):
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set(xlabel="layer", ylim=(0.3, 1.02))
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.savefig(FOLDER / "layers.png", dpi=70)
    plt.close(figure)


def with_half_width(values: Sequence[float], digits: int = 2) -> str:
    """The mean, with its 95 % interval over the answers."""
    return f"{np.mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def gain(rows: Rows, name: str, key: str) -> list[float]:
    """By prompt: a measure of the steered model less that of the model itself."""
    pairs = zip(rows[name][key], rows["steer_none"][key], strict=True)
    return [after - before for after, before in pairs]


def at_equal_length(rows: Rows, name: str) -> float:
    """The judge's preference for the steered answer, as it would be for answers of equal length."""
    preference = expit(np.array(gain(rows, name, "reward")))
    both = ([float(len(x)) for x in rows[one]["answers"]] for one in (name, "steer_none"))
    return length_controlled(preference, *(np.array(one) for one in both)).rate


def steering_table(rows: Rows) -> str:
    """Reward and fluency by vector and length."""
    lines = []
    for name, vector, length in settings():
        if name not in rows:
            continue
        row = rows[name]
        is_base = name == "steer_none"
        lines.append(
            [
                "none" if is_base else VECTORS[vector],
                f"{length:g}",
                with_half_width(row["reward"]),
                "" if is_base else with_half_width(gain(rows, name, "reward")),
                "" if is_base else f"{at_equal_length(rows, name):.2f}",
                with_half_width(row["fluency"]),
                f"{np.mean(row['KL']):.1f}",
                f"{np.mean(row['tokens']):.0f}",
            ]
        )
    header = (
        "vector",
        "length",
        "reward",
        "minus the model's",
        "wins at equal length",
        "fluency (nats/token)",
        "KL (nats an answer)",
        "tokens",
    )
    return table(header, lines)


def steering_figure(rows: Rows) -> None:
    """Reward and fluency over the length of the vector, and against each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    for number, (vector, label) in enumerate(VECTORS.items()):
        known = [("steer_none", 0.0), *((f"steer_{vector}_{x:g}", x) for x in LENGTHS)]
        known = [(rows[name], x) for name, x in known if name in rows]
        lengths = np.array([x for _, x in known]) * (1 + 0.02 * number)
        both = {}
        for key in ("reward", "fluency"):
            values = [row[key] for row, _ in known]
            both[key] = np.mean(values, axis=1), [half_width(one) for one in values]
        look: dict[str, Any] = {"marker": ".", "color": f"C{number}", "capsize": 2, "label": label}
        axes[0].errorbar(lengths, *both["reward"], **look)
        axes[1].errorbar(lengths, *both["fluency"], **look)
        axes[2].errorbar(
            both["fluency"][0],
            both["reward"][0],
            xerr=both["fluency"][1],
            yerr=both["reward"][1],
            **look,
        )
    along = "length of the added vector (norms of the states)"
    axes[0].set(title="reward of the answers", xlabel=along)
    axes[1].set(title="their log-prob under the model itself", xlabel=along, ylabel="nats/token")
    axes[2].set(title="reward against fluency", xlabel="nats/token", ylabel="reward")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=3, loc="outside lower center")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "chat_steering.png", dpi=80)
    plt.close(figure)


def examples(rows: Rows) -> str:
    """The first answers of the model, and under every vector at the second largest length."""
    names = ["steer_none", *(f"steer_{vector}_{LENGTHS[-2]:g}" for vector in VECTORS)]
    labels = ["none", *VECTORS.values()]
    lines = [
        [label, *(_one_line(text) for text in rows[name]["answers"][:2])]
        for name, label in zip(names, labels, strict=True)
        if name in rows
    ]
    return table(("vector", "first answer", "second answer"), lines).replace("---:", "---")


def _one_line(text: str) -> str:
    short = " ".join(text.split())
    return (short[:110] + " ..." if len(short) > 110 else short).replace("|", "/")


def write_page(rows: Rows) -> None:
    """The sections and figures for which there are rows."""
    if any(f"layers_{name}" in rows for name in LABELS):
        text = layers_table(rows)
        print(text)
        layers_figure(rows)
        put(FOLDER, "layers", f"{text}\n![probes and components](layers.png)")
    if "steer_none" in rows:
        text = steering_table(rows)
        print(text)
        steering_figure(rows)
        shown = f"{text}\n![reward and fluency](chat_steering.png)\n\n{examples(rows)}"
        put(FOLDER, "chat steering", shown)
