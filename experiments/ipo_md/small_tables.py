"""Tables and figures of the study on a real chat model, from its rows alone.

Command:  python -m experiments.ipo_md.small_tables
Time:     seconds
Expect:   the sections "small ..." of this folder's README, small.png, small_reliability.png
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.page import put, table
from jaxalign.evaluation.bradley_terry import cycles, over_seeds, ratings
from jaxalign.evaluation.win_rates import length_controlled

LABELS = {
    "ipo_md": "IPO-MD",
    "online_ipo": "IPO",
    "online_dpo": "DPO",
    "nash_md_pg": "Nash-MD-PG",
    "online_slic": "SLiC",
    "regularised_policy_gradient": "RL",
    "grpo": "GRPO",
    "egpo": "EGPO",
    "reference": "reference",
}
"""Algorithm -> the name in the tables, the paper's where it has one."""
REWARDED = ("regularised_policy_gradient", "grpo")
ANNOTATORS = {"reward": "reward model", "preference": "preference model", "judge": "judge"}

Row = dict[str, Any]


def write(rows: Path, here: Path) -> str:
    """Write the README's sections and the figures of a folder; returns the tables as text."""
    sections = {
        "small all against all": standings(rows),
        "small annotators": annotators(rows),
        "small sweep": sweep(rows),
    }
    for name, text in sections.items():
        put(here, name, text)
    draw(rows, here / "small.png")
    draw_reliability(rows, here / "small_reliability.png")
    return "\n".join(sections.values())


# ------------------------------------------------------------------------------ rows


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_methods(rows: Path, kind: str) -> dict[str, list[Row]]:
    """The rows of all methods that have some, in the order of the table."""
    every = {name: read(rows / f"{kind}_{name}.jsonl") for name in LABELS}
    return {name: own for name, own in every.items() if own}


def by_seed(rows: Sequence[Row], field: str) -> dict[int, list[Any]]:
    """Seed -> a field of a policy's responses, in the order of the prompts."""
    found: dict[int, list[Any]] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], row["prompt"])):
        found.setdefault(row["seed"], []).append(row[field])
    return found


def games_of(verdicts: Sequence[Row]) -> tuple[list[str], np.ndarray]:
    """Names of the judged policies, and the judge's verdicts [prompts, policies, policies, seeds].

    NaN where two were not compared, 1/2 for a policy against itself.
    """
    own = [row for row in verdicts if row["annotator"] == "judge"]
    names = [name for name in LABELS if any(name in (row["one"], row["other"]) for row in own)]
    seeds = sorted({row["seed"] for row in own})
    games = np.full((len(own[0]["preference"]), len(names), len(names), len(seeds)), np.nan)
    games[:, range(len(names)), range(len(names))] = 0.5
    for row in own:
        i, j, seed = names.index(row["one"]), names.index(row["other"]), seeds.index(row["seed"])
        games[:, i, j, seed] = row["preference"]
        games[:, j, i, seed] = 1 - np.asarray(row["preference"])
    return names, games


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The mean of a few numbers, and their standard deviation in brackets."""
    if len(values) < 2:
        return form.format(np.mean(values))
    return f"{form.format(np.mean(values))} ({form.format(np.std(values, ddof=1))})"


# ------------------------------------------------------------------------------ tables


def standings(rows: Path) -> str:
    """All methods by the judge's rating, what each cost, and the matrix of all pairs."""
    verdicts, runs = read(rows / "judge.jsonl"), of_methods(rows, "final")
    names, games = games_of(verdicts)
    scale = ratings(np.nanmean(games, axis=3))
    ranked = [names[at] for at in np.argsort(-scale.elo)]
    written = {name: read(rows / f"responses_{name}.jsonl") for name in names}
    said = {name: by_seed(own, "response") for name, own in written.items()}
    over = {}
    for row in verdicts:
        if row["other"] == "reference":
            over[row["annotator"], row["one"], row["seed"]] = row["preference"]

    def mean(name: str, field: str) -> str:
        return spread([float(np.mean(x)) for x in by_seed(written[name], field).values()], "{:.1f}")

    def wins(annotator: str, name: str) -> str:
        own = [np.mean(x) for (a, n, _), x in over.items() if (a, n) == (annotator, name)]
        return spread(own, "{:.3f}")

    def at_equal_length(name: str) -> str:
        seeds = [seed for a, n, seed in over if (a, n) == ("judge", name)]
        controlled = [
            length_controlled(
                np.asarray(over["judge", name, seed]),
                np.array([len(x) for x in said[name][seed]]),
                np.array([len(x) for x in said["reference"][seed]]),
                resamples=0,
            ).rate
            for seed in seeds
        ]
        return spread(controlled, "{:.3f}")

    cells = []
    for name in ranked:
        at = names.index(name)
        tokens = mean(name, "tokens")
        elo = f"{scale.elo[at]:.0f} ({scale.low[at]:.0f} to {scale.high[at]:.0f})"
        if name == "reference":
            cells.append([LABELS[name], "–", "0.500", "0.500", "0.500", "0.500", "0", tokens, elo])
            continue
        run = runs[name][0]
        views = [wins(annotator, name) for annotator in ("preference", "reward")]
        own = "reward" if name in REWARDED else "preference"
        views[own == "reward"] += " \\*"
        kl = mean(name, "log_ratio")
        strength = f"{run['parameter']} = {run['strength']:g}"
        judge = wins("judge", name), at_equal_length(name)
        cells.append([LABELS[name], strength, *judge, *views, kl, tokens, elo])
    header = [
        *("method", "strength", "wins over the reference: judge", "at equal length"),
        *("preference model", "reward model", "KL, nats", "tokens", "Elo of all against all"),
    ]
    matrix = [
        [
            LABELS[one],
            *(
                "0.500"
                if one == other
                else spread(
                    np.nanmean(games[:, names.index(one), names.index(other)], axis=0), "{:.3f}"
                )
                for other in ranked
            ),
        ]
        for one in ranked
    ]
    found = cycles(np.nanmean(games, axis=3))
    updates = sorted({run["updates"] for own in runs.values() for run in own})
    pairings = over_seeds(np.nanmean(games[:, 0, 1], axis=0).tolist()).number
    note = (
        f"Means of {pairings} seeds, standard deviations in brackets; {games.shape[0]} test "
        f"prompts, final runs of {' or '.join(map(str, updates))} updates. \\* the annotator that "
        "the method learned from. In the matrix, the judge's mean preference of the row over the "
        f"column. The judge's majority is a circle on {100 * found.rate:.1f} % of "
        f"{found.triples:,} triples of policies on a prompt."
    )
    return "\n".join(
        [
            table(header, cells),
            table(["", *(LABELS[name] for name in ranked)], matrix),
            f"{note}\n",
            "![wins over divergence, divergence and length over updates](small.png)",
        ]
    )


def annotators(rows: Path) -> str:
    """Accuracy and calibration of the annotators and the judge on held-out pairs."""
    cells = []
    for name, label in ANNOTATORS.items():
        own = {row["source"]: row for row in read(rows / f"annotator_{name}.jsonl")}
        if own:
            accuracies = [f"{own[x]['accuracy']:.3f}" for x in ("ultrafeedback", "polite", "all")]
            errors = [f"{own[x]['error']:.3f}" for x in ("ultrafeedback", "polite", "all")]
            cells.append([label, *accuracies, *errors])
    own = {row["source"]: row for row in read(rows / "annotator_reward.jsonl")}
    longer = [f"{own[x]['longer']:.3f}" for x in ("ultrafeedback", "polite", "all")]
    cells.append(["the longer response", *longer, "–", "–", "–"])
    counts = {source: row["pairs"] for source, row in own.items()}
    header = [
        "",
        f"UltraFeedback ({counts['ultrafeedback']} pairs): accuracy",
        f"polite ({counts['polite']}): accuracy",
        f"all ({counts['all']}): accuracy",
        *("UltraFeedback: ECE", "polite: ECE", "all: ECE"),
    ]
    return table(header, cells) + "\n![reliability of the annotators](small_reliability.png)"


def sweep(rows: Path) -> str:
    """Each method's strengths: wins in the eyes of its own annotator and of the judge, KL."""
    cells = []
    for name, own in of_methods(rows, "sweep").items():
        annotator = "reward" if name in REWARDED else "preference"
        ends = [row["curve"][-1] for row in own]
        best = int(np.argmax([end[f"wins/{annotator}"] for end in ends]))
        for at, (row, end) in enumerate(zip(own, ends, strict=True)):
            mark = " (chosen)" if at == best else ""
            wins = [f"{end[f'wins/{x}']:.3f}" for x in (annotator, "judge")]
            numbers = [*wins, f"{end['kl']:.2f}", f"{end['length']:.1f}"]
            strength = f"{row['parameter']} = {row['strength']:g}"
            cells.append([f"{LABELS[name]}{mark}", strength, *numbers])
    header = ["method", "strength", "wins: own annotator", "wins: judge", "KL, nats", "tokens"]
    return table(header, cells)


# ------------------------------------------------------------------------------ figures


def draw(rows: Path, path: Path) -> None:
    """Wins over divergence before own annotator and judge, divergence and length over updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained")
    for name, runs in of_methods(rows, "final").items():
        own = "reward" if name in REWARDED else "preference"

        def mean(field: str, runs: Sequence[Row] = runs) -> np.ndarray:
            return np.mean([[point[field] for point in run["curve"]] for run in runs], axis=0)

        steps, kl = mean("update"), mean("kl")
        line = axes[0].plot(kl, mean(f"wins/{own}"), marker=".", label=LABELS[name])[0]
        style = {"marker": ".", "color": line.get_color()}
        axes[1].plot(kl, mean("wins/judge"), **style)
        axes[2].plot(steps, kl, **style)
        axes[3].plot(steps, mean("length"), **style)
    axes[0].set(xlabel="KL, nats", ylabel="wins over the reference", title="Its own annotator")
    axes[1].set(xlabel="KL, nats", ylabel="wins over the reference", title="The held-out judge")
    axes[2].set(xlabel="update", ylabel="KL, nats", title="Divergence from the reference")
    axes[3].set(xlabel="update", ylabel="tokens", title="Length")
    for axis in axes:
        axis.grid(alpha=0.3)
    low, high = zip(*(axis.get_ylim() for axis in axes[:2]), strict=True)
    for axis in axes[:2]:
        axis.set_ylim(min(low), max(high))
        axis.axhline(0.5, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_reliability(rows: Path, path: Path) -> None:
    """Accuracy over confidence of the annotators and the judge on held-out pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained", sharey=True)
    for axis, (name, label) in zip(axes, ANNOTATORS.items(), strict=True):
        own = {row["source"]: row for row in read(rows / f"annotator_{name}.jsonl")}
        axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
        for source, row in own.items():
            if source == "all":
                continue
            bins = row["bins"]
            sizes = [4 * one["pairs"] for one in bins]
            place = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
            axis.scatter(*place, s=sizes, alpha=0.6, label=f"{source}, ECE {row['error']:.2f}")
        axis.set(xlabel="confidence", title=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    axes[0].set(ylabel="accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    HERE = Path(__file__).parent
    print(write(HERE / "rows", HERE))
