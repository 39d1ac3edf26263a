"""Tables, figure and found prompts of the searches on a chat model, from their rows alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.page import put, table
from experiments.rows import Rows
from jaxalign.evaluation.just_eval import QUALITY

FOLDER = Path(__file__).parent
FIRST = "You are a helpful assistant."
SEARCHES: dict[str, dict[str, Any]] = {
    "beam": {"width": 2, "actions": 2, "depth": 3},
    "gepa": {"budget": 18, "pareto_queries": 3, "minibatch": 2, "depth": 6},
    "greedy": {"actions": 2, "depth": 5},
    "monte-carlo": {"width": 5, "actions": 1, "depth": 2},
}
"""Search -> sizes: 1 + 2 + 4 + 4 rewards and 10 proposals; at most 18 and 3; 1 + 2 x 5 and 10;
1 + 5 x 2 and 10."""
LABELS = {
    "none": "no prompt",
    "one_line": "one line",
    "urial": "URIAL",
    "beam": "beam",
    "gepa": "GEPA",
    "greedy": "greedy",
    "monte-carlo": "Monte Carlo",
}
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}
RESAMPLES = 10_000


def mean_score(row: Mapping[str, Any]) -> float:
    """The mean of an answer's scores."""
    return float(np.mean(list(row["scores"].values())))


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference with its 95 % interval, by a bootstrap of the prompts.

    Args:
      values: by prompt.
      base: of the same prompts.
    """
    gaps = np.asarray(values, float) - np.asarray(base, float)
    draws = np.random.default_rng(0).integers(len(gaps), size=(RESAMPLES, len(gaps)))
    low, high = np.quantile(gaps[draws].mean(1), (0.025, 0.975))
    return float(gaps.mean()), float(low), float(high)


def difference(values: Sequence[float], base: Sequence[float]) -> str:
    """`paired` as text."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired(values, base))


def measures(rows: Rows, model: str, name: str) -> dict[str, list[float]] | None:
    """What a prompt's answers measured, by held-out prompt; None: they were not made.

    Args:
      rows: of the study.
      model: its name in the rows.
      name: of the prompt.
    """
    if (source := f"{model}_answers_{name}") not in rows:
        return None
    own = rows[source]["answers"]
    found = {
        "judge": [mean_score(row) for row in own],
        "overlap": [row["overlap"] for row in own],
        "words": [float(len(row["answer"].split())) for row in own],
        "ended": [float(row["finished"]) for row in own],
        "empty": [float(not row["answer"].strip()) for row in own],
    }
    found |= {aspect: [row["scores"][aspect] for row in own] for aspect in QUALITY}
    if (label := f"{model}_likelihood_{name}") in rows:
        known = rows[label]["log_prob"]
        found["log_prob"] = [known.get(row["prompt"], np.nan) for row in own]
    return found


def answers_table(rows: Rows, model: str) -> str:
    """The table of held-out answers."""
    base, lines = measures(rows, model, "none"), []
    for name, label in LABELS.items():
        own = measures(rows, model, name)
        if own is None or base is None:
            continue
        bare = name == "none"
        lines.append(
            [
                label,
                f"{np.mean(own['judge']):.3f}",
                "" if bare else difference(own["judge"], base["judge"]),
                *(f"{np.mean(own[aspect]):.2f}" for aspect in QUALITY),
                f"{np.mean(own['overlap']):.3f}"
                if bare
                else difference(own["overlap"], base["overlap"]),
                f"{np.nanmean(own['log_prob']):.2f}" if "log_prob" in own else "",
                f"{np.mean(own['words']):.0f}",
                f"{sum(own['ended']):.0f} of {len(own['ended'])}",
                f"{sum(own['empty']):.0f}",
            ]
        )
    header = ["prompt", "mean score", "over no prompt", *QUALITY]
    header += ["words of GPT-4's answer (F1)", "nats a token", "words", "ended", "empty"]
    return table(header, lines)


def searches_table(rows: Rows, model: str) -> str:
    """The table of the searches' cost and result."""
    lines = []
    for name in SEARCHES:
        if (label := f"{model}_search_{name}") not in rows:
            continue
        row = rows[label]
        counts, path = row["counts"], row["path"]
        chosen = {one["prompt"]: one["mean"] for one in row["validation"]}
        lines.append(
            [
                LABELS[name],
                str(counts["rewarded"]),
                f"{counts.get('optimizer', 0)}",
                f"{counts.get('optimizer unreadable', 0)}",
                str(row["prompts"]),
                str(row["judge_requests"]),
                f"{row['judge_prompt_tokens']:,}",
                f"{row['judge_written_tokens']:,}",
                f"{'at least ' * row['resumed']}{row['minutes']:.1f}",
                f"{path[0]['reward']:.2f} → {path[-1]['reward']:.2f}",
                f"{chosen[FIRST]:.2f} → {chosen[row['prompt']]:.2f}",
                "the first prompt"
                if row["prompt"] == FIRST
                else f"{len(row['prompt'].split())} words",
            ]
        )
    header = ["search", "rewarded", "proposals", "unreadable", "prompts", "new requests"]
    header += ["tokens read", "written", "minutes", "best path", "fresh queries", "chosen"]
    return table(header, lines)


def written_text(rows: Rows, model: str) -> str:
    """A sentence on the judge's written scores; empty: none were asked for."""
    if (label := f"{model}_written") not in rows:
        return ""
    row = rows[label]
    scores = [x for one in row["judgements"] for x in one["scores"].values()]
    chosen = Counter(name for one in row["judgements"] for name in one["scores"])
    counts = ", ".join(f"{int(x)}: {n}" for x, n in sorted(Counter(scores).items()))
    known = [one for one in row["judgements"] if one["scores"]]
    means = sorted(one["log_probs"] for one in known)
    spread = f"{means[0]:.2f} to {means[-1]:.2f}" if means else "none"
    return (
        f"Written scores of {len(row['judgements'])} answers without a prompt: unreadable choices "
        f"of criteria {row['unreadable'].get('selector', 0)}, unreadable scores "
        f"{row['unreadable'].get('evaluator', 0)}; scores {counts or 'none'}; criteria "
        + (", ".join(f"{name} {n}" for name, n in chosen.most_common()) or "none")
        + f". By log-probs the same answers have {spread}; {row['minutes']:.1f} minutes.\n"
    )


def prompts_text(rows: Rows, model: str) -> str:
    """The prompts that were found, with links to their pages."""
    lines = []
    for name in SEARCHES:
        if (label := f"{model}_search_{name}") in rows:
            text = " ".join(rows[label]["prompt"].split())
            page = f"found/{model}_{name}"
            lines.append(f"- {LABELS[name]} ([prompt]({page}.json), [tree]({page}.html)): {text}")
    return "\n".join(lines) + "\n" if lines else ""


def plot(rows: Rows, models: Sequence[str], here: Path = FOLDER) -> None:
    """Differences from no prompt with their intervals, by judge and by GPT-4's words."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"judge": "judge's mean score", "overlap": "words of GPT-4's answer (F1)"}
    figure, axes = plt.subplots(
        len(models), 2, figsize=(9, 3 * len(models)), layout="constrained", squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        base = measures(rows, model, "none")
        for axis, (measure, label) in zip(line, panels.items(), strict=True):
            names = []
            for name in [one for one in LABELS if one != "none"]:
                own = measures(rows, model, name)
                if own is None or base is None:
                    continue
                mean, low, high = paired(own[measure], base[measure])
                color = "C0" if name in SEARCHES else "grey"
                axis.plot([low, high], [len(names)] * 2, color=color)
                axis.plot(mean, len(names), "o", color=color)
                names.append(LABELS[name])
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.axvline(0, color="black", linewidth=0.8)
            axis.locator_params(axis="x", nbins=5)
            axis.margins(y=0.15)
            axis.set_title(f"{MODELS.get(model, model)}, over no prompt", fontsize=10)
            axis.set_xlabel(label)
            axis.locator_params(axis="x", nbins=5)
            axis.grid(axis="x", alpha=0.3)
    figure.savefig(here / "small.png", dpi=100)
    plt.close(figure)


def write_page(rows: Rows, here: Path = FOLDER) -> str:
    """Write the README's sections; returns them.

    Args:
      rows: of the study.
      here: folder of the README.
    """
    scores, searches = [], []
    for model, label in MODELS.items():
        if f"{model}_answers_none" not in rows:
            continue
        number = len(rows[f"{model}_answers_none"]["answers"])
        scores += [f"{label}, {number} held-out prompts:\n", answers_table(rows, model)]
        parts = searches_table(rows, model), prompts_text(rows, model), written_text(rows, model)
        searches += [f"{label}:\n", *filter(None, parts)]
    sections = {"small": "\n".join(scores), "small searches": "\n".join(searches)}
    for name, text in sections.items():
        put(here, name, text)
    return "\n".join(sections.values())
