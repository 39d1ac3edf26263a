"""What the responses to a prompt did to each other's log-probs, as a run measured it."""

from collections.abc import Sequence

from jaxalign.reporting.charts import Chart, Series, colour
from jaxalign.reporting.runs import Run

ROWS = (
    ("displaced", "reinforced, but to fall (displaced)", "{:.1%}"),
    ("displaced_by_negative", "displaced, but not without the suppressed ones", "{:.1%}"),
    ("lifted", "suppressed, but to rise (lifted)", "{:.1%}"),
    ("positive/predicted", "reinforced: predicted change", "{:z.4g}"),
    ("positive/own", "reinforced: from itself", "{:z.4g}"),
    ("positive/from_positive", "reinforced: from other reinforced ones", "{:z.4g}"),
    ("positive/from_negative", "reinforced: from suppressed ones", "{:z.4g}"),
    ("negative/predicted", "suppressed: predicted change", "{:z.4g}"),
    ("negative/own", "suppressed: from itself", "{:z.4g}"),
    ("negative/from_positive", "suppressed: from reinforced ones", "{:z.4g}"),
    ("negative/from_negative", "suppressed: from other suppressed ones", "{:z.4g}"),
    ("cosine_positive", "cosine between reinforced ones", "{:z.3f}"),
    ("cosine_negative", "cosine between suppressed ones", "{:z.3f}"),
    ("cosine_between", "cosine of reinforced with suppressed ones", "{:z.3f}"),
    ("positive", "responses reinforced", "{:.1%}"),
    ("negative", "responses suppressed", "{:.1%}"),
    ("positive/realised", "reinforced: realised change (nats per step)", "{:z.4g}"),
    ("negative/realised", "suppressed: realised change (nats per step)", "{:z.4g}"),
    ("agreement", "realised changes with the predicted sign", "{:.1%}"),
)
"""Metric, its name in the table and the format of its mean over the measured steps."""

SOURCES = {
    "positive/own": ("reinforced: itself", 0, False),
    "positive/from_positive": ("reinforced: other reinforced", 2, False),
    "positive/from_negative": ("reinforced: suppressed", 1, False),
    "negative/own": ("suppressed: itself", 0, True),
    "negative/from_positive": ("suppressed: reinforced", 2, True),
    "negative/from_negative": ("suppressed: other suppressed", 1, True),
}
"""Metric -> its name in the chart, the number of its colour, and whether its line is dashed."""


def watched(run: Run) -> bool:
    """Whether the run measured the gradients of its groups."""
    return bool(_curve(run, "positive")[0])


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the mean over the measured steps, a column per run."""
    rows = []
    for metric, label, form in ROWS:
        curves = [_curve(run, metric)[1] for run in runs]
        if any(curves):
            means = [form.format(sum(one) / len(one)) if one else "" for one in curves]
            rows.append([label, *means])
    return ["responses of the training batches", *(run.name for run in runs)], rows


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Displaced and lifted responses, and cosines; of one run, also what pushes what."""
    displaced, cosines = [], []
    for index, run in enumerate(runs):
        before, shade = (f"{run.name}: ", index) if len(runs) > 1 else ("", None)
        for at, metric in enumerate(("displaced", "lifted")):
            displaced.append(_series(run, metric, before + metric, shade, at))
        named = {"cosine_positive": "both reinforced", "cosine_between": "one of each"}
        for at, (metric, label) in enumerate(named.items()):
            cosines.append(_series(run, metric, before + label, shade, at))
    shown = [
        Chart(
            title="Responses that move against their advantage",
            series=displaced,
            y_label="fraction",
            y_range=(0.0, 1.0),
        ),
        Chart(title="Cosine of two responses' gradients", series=cosines, y_label="mean", rule=0.0),
    ]
    if len(runs) > 1:
        return shown
    sources = [
        Series(
            x=_curve(runs[0], metric)[0],
            y=_curve(runs[0], metric)[1],
            label=label,
            colour=colour(number),
            dashed=dashed,
        )
        for metric, (label, number, dashed) in SOURCES.items()
    ]
    pushes = Chart(
        title="What pushes a log-prob",
        series=sources,
        y_label="nats per unit of learning rate",
        rule=0.0,
    )
    return [pushes, *shown]


def _series(run: Run, metric: str, label: str, shade: int | None, at: int) -> Series:
    """A line in the colour of the run, or, of one run alone, of the metric."""
    steps, values = _curve(run, metric)
    return Series(
        x=steps,
        y=values,
        label=label,
        colour=colour(at if shade is None else shade),
        dashed=shade is not None and at > 0,
    )


def _curve(run: Run, metric: str) -> tuple[list[int], list[float]]:
    return run.curve("online", "train", f"entanglement/{metric}")
