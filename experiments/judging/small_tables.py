"""Tables and figure of the judges that can read, from their rows alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.judging.compare import SETS, SHORT, cell, right, share
from experiments.page import table
from experiments.rows import Rows
from jaxalign.evaluation import Verdicts, agreement, win_rate

FOLDER = Path(__file__).parent
QUESTIONS: dict[str, Path | None] = {
    "default": None,
    "short": SHORT,
    "short, for chat": FOLDER / "short_chat.txt",
}
"""Name of a question -> its template; None: the one that is built in."""
LABELS = {
    "first": "always the first",
    "coin": "a coin",
    "longer": "the longer one",
    "overlap": "more of the request's words",
    "likelihood": "SmolLM2, log-prob a token",
    "lm": "SmolLM2, A or B",
    "reward": "reward model on SmolLM2",
    "server": "1.5B model, A or B",
}
"""Judges in the order of the tables."""
PLOTTED = ("longer", "likelihood", "reward", "server")


def from_row(entry: Mapping[str, Any], most: int | None = None) -> Verdicts:
    """The reverse of `in_table`, of the first `most` comparisons."""
    preference = np.array(entry["preference"], float)[:most]
    orders = entry["by_order"]
    return Verdicts(
        preference=preference,
        reasons=tuple("" if np.isfinite(one) else "no verdict" for one in preference),
        by_order=None if orders is None else np.array(orders, float)[:most],
    )


def question_row(judge: str, name: str) -> str:
    """The name of the row of a question to a judge."""
    return f"question_{judge}_{'_'.join(name.replace(',', '').split())}"


def chosen_question(rows: Rows, judge: str) -> str:
    """The question that people's choice agrees with most; of equal ones the more consistent."""

    def quality(name: str) -> tuple[float, float]:
        entries = rows[question_row(judge, name)]["sets"].values()
        agreed = np.concatenate([right(from_row(one)) for one in entries])
        same = [from_row(one).order_consistency or 0.0 for one in entries]
        unread = np.isnan(agreed)
        return float(np.mean(np.where(unread, 0.5, agreed))), float(np.mean(same))

    return max(QUESTIONS, key=quality)


def together(rows: Rows, name: str, most: int | None = None) -> tuple[Verdicts, dict[str, Any]]:
    """A judge's verdicts on all sets, and what is known of the comparisons."""
    entries = rows[name]["sets"]
    known = rows["comparisons"]["sets"]
    parts = [from_row(entries[label], most) for label in SETS]
    counts = [len(part.preference) for part in parts]
    columns = {
        field: [x for label, n in zip(SETS, counts, strict=True) for x in known[label][field][:n]]
        for field in ("request", "part", "better_words", "worse_words")
    }
    columns["set"] = [label for label, n in zip(SETS, counts, strict=True) for _ in range(n)]
    orders = [part.by_order for part in parts if part.by_order is not None]
    whole = Verdicts(
        preference=np.concatenate([part.preference for part in parts]),
        reasons=sum((part.reasons for part in parts), ()),
        by_order=np.concatenate(orders) if orders else None,
    )
    return whole, columns


def lead(columns: Mapping[str, Any]) -> np.ndarray:
    """Words of the better response less those of the other."""
    return np.array(columns["better_words"]) - np.array(columns["worse_words"])


def one_order(verdicts: Verdicts) -> float | None:
    """Agreement of a judge that is asked in one order alone: the mean over both."""
    if verdicts.by_order is None:
        return None
    said = np.sign(verdicts.by_order - 0.5)
    return float(np.nanmean(np.where(np.isfinite(said), 0.5 + 0.5 * said, np.nan)))


def subset(verdicts: Verdicts, columns: Mapping[str, Any], where: np.ndarray) -> str:
    """Agreement on some of the comparisons."""
    requests = [x for x, own in zip(columns["request"], where, strict=True) if own]
    return cell(right(verdicts)[where], requests)


def main_table(rows: Rows, names: Sequence[str], most: int | None) -> str:
    """Agreement by set and by which response is longer, and what depends on the order."""
    lines, counts = [], []
    for name in names:
        verdicts, columns = together(rows, name, most)
        sets, gap = np.array(columns["set"]), lead(columns)
        everything = np.ones(len(gap), bool)
        masks = [everything, *(sets == label for label in SETS), gap > 0, gap < 0]
        counts = [int(mask.sum()) for mask in masks]
        kappa = agreement(verdicts.preference, np.ones(len(gap))).kappa
        cells = [subset(verdicts, columns, mask) for mask in masks]
        orders = (
            one_order(verdicts),
            verdicts.order_consistency,
            verdicts.first_position_rate,
        )
        shown = ["", "", ""] if name in ("longer", "overlap", "coin") else map(share, orders)
        missing = str(sum(verdicts.failures.values()))
        lines.append([LABELS[name], cells[0], f"{kappa:.2f}", *cells[1:], *shown, missing])
    titles = ["all", *SETS, "better one is longer", "better one is shorter"]
    titles = [f"{title} ({n})" for title, n in zip(titles, counts, strict=True)]
    header = ["judge", titles[0], "kappa", *titles[1:]]
    header += ["one order", "same in both orders", "P(shown first)", "no verdict"]
    return table(header, lines)


def parts_table(rows: Rows, names: Sequence[str], most: int | None) -> str:
    """Agreement on the parts of LLMBar, by family."""
    _, columns = together(rows, names[0], most)
    families = [
        part.split()[0] if label == "LLMBar" else ""
        for part, label in zip(columns["part"], columns["set"], strict=True)
    ]
    lines = []
    for family in sorted(set(families) - {""}):
        where = np.array([one == family for one in families])
        found = [subset(together(rows, name, most)[0], columns, where) for name in names]
        lines.append([family, str(int(where.sum())), *found])
    return table(["LLMBar", "number", *(LABELS[name] for name in names)], lines)


def questions_table(rows: Rows) -> str:
    """What was seen when the question was chosen."""
    lines = []
    for judge in ("lm", "server"):
        for name in QUESTIONS:
            if question_row(judge, name) not in rows:
                continue
            entries = rows[question_row(judge, name)]["sets"].values()
            found = [from_row(one) for one in entries]
            agreed = np.concatenate([right(one) for one in found])
            orders = np.concatenate([x.by_order for x in found if x.by_order is not None])
            whole = Verdicts(preference=agreed, reasons=(), by_order=orders)
            known = agreed[np.isfinite(agreed)]
            mean = float(known.mean()) if len(known) else None
            numbers = mean, whole.order_consistency, whole.first_position_rate
            taken = "yes" if judge in rows and rows[judge]["question"] == name else ""
            missing = int(np.isnan(agreed).sum())
            lines.append([LABELS[judge], name, *map(share, numbers), str(missing), taken])
    header = ["judge", "question", "agreement", "same in both orders", "P(shown first)"]
    return table([*header, "no verdict", "chosen"], lines)


def cost_line(rows: Rows) -> str:
    """Requests, tokens and time of the server, and the reward model's data."""
    text = []
    if "server" in rows:
        row = rows["server"]
        text.append(
            f"The server answered {row['requests']:,} requests of {row['prompt_tokens']:,} tokens "
            f"(those of a reused prefix among them) with {row['completion_tokens']:,} tokens in "
            f"{row['server_cpu_seconds'] / 60:.1f} minutes of one core."
        )
    if "reward" in rows:
        row = rows["reward"]
        own, known = from_row(row["held_out"]["verdicts"]), row["held_out"]["comparisons"]
        gap = lead(known)
        shown = [subset(own, known, mask) for mask in (np.ones(len(gap), bool), gap > 0, gap < 0)]
        text.append(
            f"The reward model learnt from {row['pairs']['train']} pairs "
            f"({row['pairs']['left_out']} with a judged request left out) in "
            f"{row['training_cpu_seconds'] / 60:.1f} minutes; on {len(gap)} held-out pairs of "
            f"UltraFeedback it agrees in {shown[0]}: {shown[1]} where the chosen response is "
            f"longer ({int((gap > 0).sum())}), {shown[2]} where it is shorter "
            f"({int((gap < 0).sum())})."
        )
    return " ".join(text) + "\n"


def plot(rows: Rows, names: Sequence[str], most: int | None, path: Path) -> None:
    """Agreement by which response is longer, against length, and the 1.5B judge's two orders."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for at, name in enumerate(names):
        verdicts, columns = together(rows, name, most)
        gap = lead(columns)
        for shift, mask, colour in ((0.15, gap > 0, "C0"), (-0.15, gap < 0, "C1")):
            values = right(verdicts)[mask]
            values = values[np.isfinite(values)]
            low, middle, high = interval(values)
            error = [[middle - low], [high - middle]]
            axes[0].errorbar(middle, at + shift, xerr=error, fmt="o", color=colour)
    axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0].plot([], [], "oC0", label="better one is longer")
    axes[0].plot([], [], "oC1", label="better one is shorter")
    axes[0].axvline(0.5, color="grey", linewidth=0.8)
    axes[0].set(xlabel="agreement with people", xlim=(-0.02, 1.02))
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2)
    for name in (x for x in PLOTTED if x in names):
        verdicts, columns = together(rows, name, most)
        gap, values = lead(columns), right(verdicts)
        edges = np.quantile(gap, [0, 0.25, 0.5, 0.75, 1])
        groups = np.clip(np.searchsorted(edges, gap, side="right") - 1, 0, 3)
        means = [interval(values[(groups == x) & np.isfinite(values)]) for x in range(4)]
        places = [float(np.mean(gap[groups == x])) for x in range(4)]
        low, middle, high = np.array(means).T
        error = np.array([middle - low, high - middle])
        axes[1].errorbar(places, middle, yerr=error, fmt="o-", elinewidth=0.8, label=LABELS[name])
    axes[1].axhline(0.5, color="grey", linewidth=0.8)
    axes[1].axvline(0, color="grey", linewidth=0.8)
    axes[1].set(xlabel="words of the better less the other (means of quarters)")
    axes[1].set(ylabel="agreement with people", ylim=(-0.02, 1.02))
    for name, colour in (("lm", "C2"), ("server", "C3")):
        if name not in names:
            continue
        orders = together(rows, name, most)[0].by_order
        assert orders is not None
        axes[2].scatter(orders[:, 0], orders[:, 1], s=12, color=colour, label=LABELS[name])
    axes[2].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes[2].set(xlabel="P(better) when it is shown first", ylabel="when it is shown second")
    axes[2].set(xlim=(0, 1), ylim=(0, 1))
    for axis in axes[1:]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Low end, mean and high end of agreement; each comparison is of a request of its own."""
    found = win_rate(values)
    low, high = found.bootstrap
    return min(low, found.rate), found.rate, max(high, found.rate)


def sections(rows: Rows) -> dict[str, str]:
    """Name of a section of the README -> the tables of the rows that are there."""
    names = [name for name in LABELS if name in rows]
    if not names:
        return {}
    number = rows["comparisons"]["number"]
    table = f"{main_table(rows, names, number)}\n![agreement and length](small.png)"
    parts = [parts_table(rows, names, number)]
    larger = [name for name in names if len(together(rows, name)[1]["request"]) > 2 * number]
    if larger:
        parts.append(
            "The same with further comparisons, for the judges that cost little:\n\n"
            + main_table(rows, larger, None)
        )
    parts += [questions_table(rows), cost_line(rows)]
    return {"small": table, "small parts": "\n".join(parts)}
