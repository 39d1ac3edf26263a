"""The gradients of chosen and rejected, as a run saw them: a table and a plot."""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.reporting.figures import save_figure
from jaxalign.reporting.runs import Run

ROWS = (
    ("cosine", "cosine of the two gradients", "{:z.3f}"),
    ("norm_ratio", "norm of rejected / chosen gradient", "{:z.3f}"),
    ("d_w", "d_w, pull on chosen", "{:z.4g}"),
    ("d_l", "d_l, push on rejected", "{:z.4g}"),
    ("in_band", "pairs inside the disentanglement band", "{:.1%}"),
    ("ideal", "ideal: chosen up, rejected down", "{:.1%}"),
    ("both_down", "both down", "{:.1%}"),
    ("both_up", "both up", "{:.1%}"),
    ("reversed", "reversed: chosen down, rejected up", "{:.1%}"),
    ("undefined", "undefined (a gradient or coefficient is zero)", "{:.1%}"),
    ("realised_chosen", "realised change of chosen (nats a step)", "{:z.3f}"),
    ("realised_rejected", "realised change of rejected (nats a step)", "{:z.3f}"),
    ("case_agreement", "pairs whose update did what their own gradients say", "{:.1%}"),
    ("adamw/cosine", "cosine in AdamW's inner product", "{:z.3f}"),
    ("adamw/both_down", "both down, in AdamW's inner product", "{:.1%}"),
    ("adamw/case_agreement", "pairs whose update did what that says", "{:.1%}"),
)
"""Metric -> how the table calls and prints its mean over the watched steps."""

CASES = {
    "ideal": ("#4c9f70", "ideal"),
    "both_down": ("#c44e52", "both down"),
    "both_up": ("#dd8452", "both up"),
    "reversed": ("#8172b3", "reversed"),
    "undefined": ("#cccccc", "undefined"),
}


def watched(run: Run) -> bool:
    """Whether the run looked at its gradients."""
    return bool(_curve(run, "cosine")[0])


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the mean over the watched steps, a column per run."""
    rows = []
    for metric, label, form in ROWS:
        means = [_mean(_curve(run, metric)[1]) for run in runs]
        if any(means) or metric in ("ideal", "both_down", "both_up"):
            rows.append([label, *("" if x is None else form.format(x) for x in means)])
    return ["pairs of the training batches", *(run.name for run in runs)], rows


def plot(runs: Sequence[Run], path: Path) -> None:
    """Cosine, cases, and the ratios that decide them, over the steps of the preference stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for run in runs:
        steps, values = _smooth(*_curve(run, "cosine"))
        left.plot(steps, values, label=run.name)
    left.set(title="Cosine of the two gradients", ylabel="mean over the batch")
    left.axhline(0.0, color="grey", linewidth=0.8)
    if len(runs) == 1:
        steps, _ = _curve(runs[0], "ideal")
        shares = [_smooth(*_curve(runs[0], case))[1] for case in CASES]
        colours, labels = zip(*CASES.values(), strict=True)
        middle.stackplot(steps, *shares, colors=colours, labels=labels, linewidth=0)
        middle.set(title="What a step does to its pair", ylabel="share of pairs", ylim=(0, 1))
        handles = [
            handle for handle, share in zip(middle.collections, shares, strict=True) if any(share)
        ]
        middle.legend(handles=handles, fontsize=8, loc="lower right")
        for name, label in (("c_w", "⟨g_w, g_l⟩ / n_w"), ("c_l", "⟨g_w, g_l⟩ / n_l")):
            right.plot(*_smooth(*_curve(runs[0], name)), label=label)
        right.axhline(1.0, color="grey", linewidth=0.8)
        right.set(title="Above 1, DPO moves both the same way", ylabel="mean")
    else:
        for run in runs:
            middle.plot(*_smooth(*_curve(run, "both_down")), label=run.name)
            right.plot(*_smooth(*_curve(run, "both_up")), label=run.name)
        middle.set(title="Pairs that a step sends both down", ylabel="share of pairs")
        right.set(title="Pairs that a step sends both up", ylabel="share of pairs")
        left.legend(fontsize=8)
        for axis in (middle, right):  # a single pair among hundreds is to look like one
            axis.set_ylim(0, max(0.1, axis.get_ylim()[1]))
    if len(runs) == 1:
        right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)


def _curve(run: Run, metric: str) -> tuple[list[int], list[float]]:
    return run.curve("preference", "train", f"entanglement/{metric}")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _smooth(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """The mean of a window of a twentieth of the curve around each point."""
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return steps, [sum(window) / len(window) for window in windows]
