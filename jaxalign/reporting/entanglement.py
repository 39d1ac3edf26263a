"""The gradients of chosen and rejected responses, as a run measured them: a table and charts."""

import dataclasses
from collections.abc import Sequence

from jaxalign.reporting.charts import Chart, Series, colour
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
    ("realised_chosen", "realised change of chosen (nats per step)", "{:z.3f}"),
    ("realised_rejected", "realised change of rejected (nats per step)", "{:z.3f}"),
    ("case_agreement", "pairs whose update agrees with their own gradients", "{:.1%}"),
    ("adamw/cosine", "cosine in AdamW's inner product", "{:z.3f}"),
    ("adamw/both_down", "both down, in AdamW's inner product", "{:.1%}"),
    ("adamw/case_agreement", "pairs whose update agrees with that case", "{:.1%}"),
)
"""Metric, its name in the table and the format of its mean over the measured steps."""

CASES = {
    "ideal": ("#4c9f70", "ideal"),
    "both_down": ("#c44e52", "both down"),
    "both_up": ("#dd8452", "both up"),
    "reversed": ("#8172b3", "reversed"),
    "undefined": ("#cccccc", "undefined"),
}
"""Case of a pair in the metrics, its colour and its name."""


def watched(run: Run) -> bool:
    """Whether the run measured its gradients."""
    return bool(_curve(run, "cosine")[0])


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the mean over the measured steps, a column per run."""
    rows = []
    for metric, label, form in ROWS:
        means = [_mean(_curve(run, metric)[1]) for run in runs]
        if any(means) or metric in ("ideal", "both_down", "both_up"):
            rows.append([label, *("" if x is None else form.format(x) for x in means)])
    return ["pairs of the training batches", *(run.name for run in runs)], rows


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Cosine, cases, and the ratios that decide them, over the steps of the preference stage."""

    def curve(index: int, metric: str, label: str = "", shade: int | None = None) -> Series:
        steps, values = _smooth(*_curve(runs[index], metric))
        return Series(x=steps, y=values, label=label, colour=colour(shade or index))

    cosine = Chart(
        title="Cosine of the two gradients",
        series=[
            curve(at, "cosine", run.name if len(runs) > 1 else "") for at, run in enumerate(runs)
        ],
        y_label="mean over the batch",
        rule=0.0,
    )
    if len(runs) > 1:
        both = [
            Chart(
                title=f"Pairs that a step sends both {way}",
                series=[curve(at, f"both_{way}") for at in range(len(runs))],
                y_label="fraction of pairs",
            )
            for way in ("down", "up")
        ]
        return [cosine, *map(_from_zero, both)]
    ratios = Chart(
        title="Above 1, DPO moves both the same way",
        series=[
            curve(0, "c_w", "⟨g_w, g_l⟩ / n_w"),
            curve(0, "c_l", "⟨g_w, g_l⟩ / n_l", shade=1),
        ],
        y_label="mean",
        rule=1.0,
    )
    return [cosine, _cases(runs[0]), ratios]


def _cases(run: Run) -> Chart:
    """The fractions of the cases, stacked."""
    steps, _ = _curve(run, "ideal")
    areas, base = [], [0.0] * len(steps)
    for case, (shade, label) in CASES.items():
        fractions = _smooth(*_curve(run, case))[1]
        if any(fractions):
            areas.append(
                Series(kind="area", x=steps, y=fractions, base=base, label=label, colour=shade)
            )
            base = [below + part for below, part in zip(base, fractions, strict=True)]
    return Chart(
        title="What a step does to its pair",
        series=areas,
        y_label="fraction of pairs",
        y_range=(0, 1),
    )


def _from_zero(chart: Chart) -> Chart:
    """The same from 0 to at least 0.1, so that a single pair among hundreds looks like one."""
    highest = max((y for one in chart.series for y in one.y), default=0.0)
    return dataclasses.replace(chart, y_range=(0.0, max(0.1, 1.05 * highest)))


def _curve(run: Run, metric: str) -> tuple[list[int], list[float]]:
    return run.curve("preference", "train", f"entanglement/{metric}")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _smooth(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """The mean of a window of a twentieth of the curve around each point."""
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return steps, [sum(window) / len(window) for window in windows]
