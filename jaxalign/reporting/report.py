"""The report of one run or several: what the runs did before and after, as tables and charts.

The same parts are written twice: as Markdown with PNG figures, and as a page with charts that show
their values under the pointer.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxalign.files import check_output, write_text
from jaxalign.reporting import (
    entanglement,
    feedback,
    groups,
    ledger,
    online,
    representation,
    sources,
    tasks,
)
from jaxalign.reporting.charts import Chart, Figure, Series, colour, draw
from jaxalign.reporting.page import Examples, Part, Table, Text, write_page
from jaxalign.reporting.runs import STAGES, Run

ROWS = (
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("rewards/margins", "reward margin", "{:z.3f}"),
    ("rewards/chosen", "chosen reward", "{:z.3f}"),
    ("rewards/rejected", "rejected reward", "{:z.3f}"),
    ("logps/chosen", "chosen log-prob (nats)", "{:z.2f}"),
    ("logps/rejected", "rejected log-prob (nats)", "{:z.2f}"),
    ("logps/accuracies", "P(chosen) > P(rejected)", "{:z.3f}"),
    ("logps/mean_accuracies", "the same, per token", "{:z.3f}"),
    ("kl", "KL to reference (nats/token)", "{:z.4f}"),
    ("preferences/consistency", "both orders name one winner", "{:z.3f}"),
    ("calibration/error", "calibration error", "{:z.3f}"),
    ("loss", "loss", "{:z.4f}"),
)
"""Metric, its name in a table and its format."""


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a line per metric, a column or two per run."""
    shown = [row for row in ROWS if any(run.first_and_last("preference", row[0]) for run in runs)]
    if len(runs) == 1:
        rows = [[label, *runs[0].cells(metric, form)] for metric, label, form in shown]
        return ["held-out pairs", "before", "after"], rows
    rows = [
        [label, *(" → ".join(run.cells(metric, form)) for run in runs)]
        for metric, label, form in shown
    ]
    return ["held-out pairs", *(run.name for run in runs)], rows


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.md` with its figures, and `index.html`, which shows the same and every metric.

    Args:
      runs: one run or several; several are drawn into the same axes.
      folder: created if it is missing.

    Returns:
      The path of `report.md`.
    """
    check_output(folder, "--output", folder=True)
    title, facts = ", ".join(run.name for run in runs), [_facts(run) for run in runs]
    parts = _parts(runs)
    for part in parts:
        if isinstance(part, Figure):
            draw(part.charts, folder / part.image)
    path = folder / "report.md"
    write_text(path, "\n".join([f"# {_plain(title)}\n", *map(_markdown, parts)]))
    write_page(title, facts, [*parts, _all_metrics(runs)], folder / "index.html")
    return path


def _parts(runs: Sequence[Run]) -> list[Part]:
    """What a report shows, in order."""
    parts: list[Part] = []
    if len(runs) > 1:
        parts += _differences(runs)
    header, rows = comparison(runs)
    if rows:
        parts.append(Table(title="Held-out pairs", header=header, rows=rows))
        if lines := [line for line in map(_without_reference, runs) if line]:
            parts.append(Text(lines=lines))
        parts.append(
            Figure(charts=_preference_charts(runs), image="preference.png", alt="held-out curves")
        )
    if labelled := [run for run in runs if feedback.has_stage(run)]:
        header, rows = feedback.table(labelled)
        parts += [
            Table(title="Labelled responses", header=header, rows=rows),
            Figure(charts=feedback.charts(labelled), image="feedback.png", alt="rewards"),
        ]
    header, rows = sources.table(runs)
    if rows:
        words = tuple(range(header.index("source") + 1))
        parts.append(
            Table(title="Held-out records by source", header=header, rows=rows, words=words)
        )
    parts += _tasks(runs)
    if sampled := [run for run in runs if online.has_stage(run)]:
        header, rows = online.table(sampled)
        parts += [
            Table(title="Held-out prompts", header=header, rows=rows),
            Figure(charts=online.charts(sampled), image="online.png", alt="held-out prompts"),
            *(part for part in map(online.samples, sampled) if part is not None),
        ]
    if grouped := [run for run in runs if groups.watched(run)]:
        header, rows = groups.table(grouped)
        parts += [
            Table(
                title="Gradients of the responses to a prompt",
                note="Means over the measured steps. Predicted changes of log-probs are to first "
                "order, in nats per unit of learning rate of gradient descent on the prompt alone.",
                header=header,
                rows=rows,
            ),
            Figure(charts=groups.charts(grouped), image="groups.png", alt="what pushes what"),
        ]
    if aligned := [run for run in runs if representation.has_stage(run)]:
        header, rows = representation.table(aligned)
        charts = representation.charts(aligned)
        parts += [
            Table(title="Hidden states", header=header, rows=rows),
            Figure(charts=charts, image="representation.png", alt="hidden states"),
        ]
    if measured := [run for run in runs if entanglement.watched(run)]:
        header, rows = entanglement.table(measured)
        parts += [
            Table(
                title="Gradients of chosen and rejected",
                note="Means over the measured steps; all trained parameters, before each update.",
                header=header,
                rows=rows,
            ),
            Figure(
                charts=entanglement.charts(measured), image="entanglement.png", alt="entanglement"
            ),
        ]
    parts += [part for run in runs if ledger.has_ledger(run) for part in _ledger(run)]
    if losses := _loss_charts(runs):
        parts.append(Figure(title="Loss", charts=losses, image="loss.png", alt="loss by stage"))
    parts += [table for run in runs if (table := _calibration(run)) is not None]
    for run in runs:
        for name, lines in (
            (f"Metrics of {run.name} that could not be read", run.skipped),
            (f"Skipped updates of {run.name}", skipped_updates(run)),
        ):
            if lines:
                parts.append(Text(title=name, lines=lines, bullets=True))
    parts += [_data(run) for run in runs if run.data]
    return parts


def _tasks(runs: Sequence[Run]) -> list[Part]:
    """Scores on tasks of the lm-evaluation-harness."""
    found = [(run, report) for run in runs if (report := tasks.read_report(run.folder))]
    if not found:
        return []
    reports = [(run.name if len(runs) > 1 else "", report) for run, report in found]
    header, rows = tasks.table(reports)
    lines = tasks.notes(reports)
    for run, report in found:
        if run.lines and (old := tasks.outdated(report, run.lines[-1])):
            lines.append(f"{run.name} has been trained since it was evaluated: {', '.join(old)}")
    words = tuple(range(header.index("metric") + 1))
    title = "Tasks of the lm-evaluation-harness"
    table = Table(title=title, header=header, rows=rows, words=words)
    return [table, Text(lines=lines, bullets=True)]


def _ledger(run: Run) -> list[Part]:
    """Where the changes of log-probs came from."""
    header, rows = ledger.table(run)
    figures = [
        Figure(
            charts=charts,
            image=f"ledger_{pairs_of}_{run.name}.png",
            alt=f"where the change came from: {name}",
        )
        for pairs_of, name in ledger.PAIRS.items()
        if (charts := ledger.charts(run, pairs_of))
    ]
    return [
        Table(
            title=f"Where the change came from: {run.name}",
            note="Changes of log-probs in nats, means over the pairs: to first order from the "
            "pair's own two gradients, from the other pairs of the batch, and from the optimiser "
            "(momentum, preconditioning, decay); and the rest, curvature. Tokens count in those "
            "steps in which they are among the 32 that moved most.",
            header=header,
            rows=rows,
        ),
        *figures,
    ]


def _facts(run: Run) -> str:
    """One line on a run."""
    stage = run.config.get("preference")
    config = {**run.config, **(stage if isinstance(stage, Mapping) else {})}
    options = config.get("loss_options")
    options = options if isinstance(options, Mapping) else {}
    if isinstance(config.get("data"), list):
        config["data"] = ", ".join(config["data"])
    texts = [f"{name} {config[name]}" for name in ("loss", "model", "data") if config.get(name)]
    texts[:1] = [", ".join([*texts[:1], *(f"{name} {value}" for name, value in options.items())])]
    written = datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime)
    texts += [str(run.folder), f"last step {written:%Y-%m-%d %H:%M}"]
    return f"{run.name}: {'; '.join(filter(None, texts))}"


def _differences(runs: Sequence[Run]) -> list[Part]:
    """The settings in which the runs differ."""
    flat = [dict(_flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one if name != "name"))
    rows = [
        [name, *(str(one.get(name, "")) for one in flat)]
        for name in names
        if any(one.get(name) != flat[0].get(name) for one in flat)
    ]
    header = ["setting", *(run.name for run in runs)]
    return [Table(title="Settings that differ", header=header, rows=rows)] if rows else []


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """The settings of a config, with dotted names."""
    settings = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            settings += _flat(value, f"{before}{name}.")
        else:
            settings.append((f"{before}{name}", value))
    return settings


def _data(run: Run) -> Table:
    """What was read, skipped and tokenised; counts of 0 are left out."""
    rows = []
    for name, counts in run.data.items():
        texts = [f"{value:,} {key.replace('_', ' ')}" for key, value in _numbers(counts)]
        sources = counts.get("first", {})
        texts += [
            f"{number:,} skipped for {reason} (first: {sources.get(reason, '?')})"
            for reason, number in counts.get("skipped", {}).items()
        ]
        texts += counts.get("chat", [])
        rows.append([name.replace("_", " "), str(counts.get("source", "")), "; ".join(texts)])
    return Table(
        title=f"Data of {run.name}", header=["what", "source", "counts"], rows=rows, words=(0, 1, 2)
    )


def _numbers(counts: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(key, value) for key, value in counts.items() if isinstance(value, int) and value]


def _preference_charts(runs: Sequence[Run]) -> list[Chart]:
    """Held-out log-probs, reward margin and accuracy over the steps of the preference stage."""
    # reward models have no log-probs
    of_policies = any(run.curve("preference", "eval", "logps/chosen")[0] for run in runs)
    shown = "logps" if of_policies else "rewards"
    has_rewards = all(run.curve("preference", "eval", "rewards/margins")[0] for run in runs)
    accuracy = "rewards/accuracies" if has_rewards else "logps/mean_accuracies"
    several = len(runs) > 1
    own_units = (not several and has_rewards) or not of_policies
    responses, margins, accuracies = [], [], []
    for index, run in enumerate(runs):
        style: Any = {"colour": colour(index), "dots": True}
        for side in ("chosen", "rejected"):
            steps, values = run.curve("preference", "eval", f"{shown}/{side}")
            label = f"{run.name}: {side}" if several else side
            dashed = side == "rejected"
            responses.append(Series(x=steps, y=values, label=label, dashed=dashed, **style))
        steps, values = _margin(run, own_units=own_units)
        margins.append(Series(x=steps, y=values, **style))
        steps, values = run.curve("preference", "eval", accuracy)
        label = run.name if several else ""
        accuracies.append(Series(x=steps, y=values, label=label, **style))
    first = ("Log-prob of the response", "nats, summed over tokens")
    margin = ("Reward margin", "chosen − rejected")
    if of_policies and not own_units:  # rewards have units of their own
        margin = ("Log-prob margin, change from the start", "nats, chosen − rejected")
    if not of_policies:
        first = ("Reward of the response", "reward")
    return [
        Chart(title=first[0], y_label=first[1], series=responses),
        Chart(title=margin[0], y_label=margin[1], series=margins),
        Chart(
            title="Reward accuracy" if has_rewards else "Accuracy per token",
            y_label="fraction of held-out pairs",
            series=accuracies,
            rule=0.5,
        ),
    ]


def _margin(run: Run, *, own_units: bool) -> tuple[list[int], list[float]]:
    """The reward margin; or in nats, the gap of log-probs less what it was at the start."""
    if own_units:
        return run.curve("preference", "eval", "rewards/margins")
    steps, chosen = run.curve("preference", "eval", "logps/chosen")
    _, rejected = run.curve("preference", "eval", "logps/rejected")
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    return steps, [gap - gaps[0] for gap in gaps]


def _without_reference(run: Run) -> str:
    """Why a run of log-probs has no rewards, if it has none."""
    if not run.first_and_last("preference", "logps/chosen"):
        return ""
    if run.first_and_last("preference", "rewards/margins"):
        return ""
    return (
        f"{run.name}: its loss reads no reference, so none was kept or evaluated, and there are no "
        "rewards and no KL; `--reference live` adds them."
    )


def _calibration(run: Run) -> Table | None:
    """How often the predicted winners of about the same confidence were the right ones."""
    values = run.last("preference", "eval")
    rows = [
        [
            f"{name.split('/')[1]} and above",
            f"{values[name]:.0f}",
            *(f"{values[name.replace('pairs', of)]:.3f}" for of in ("confidence", "accuracy")),
        ]
        for name in values
        if name.startswith("calibration/") and name.endswith("/pairs")
    ]
    header = ["confidence", "pairs", "mean confidence", "accuracy"]
    return Table(title=f"Calibration of {run.name}", header=header, rows=rows) if rows else None


def _loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Training and held-out loss of every stage."""
    return [
        _metric_chart(runs, stage, "loss", stage)
        for stage in STAGES
        if any(run.curve(stage, "train", "loss")[0] for run in runs)
    ]


def _metric_chart(runs: Sequence[Run], stage: str, metric: str, title: str) -> Chart:
    """A metric while training, as a thin line, and on held-out data, with a dot an evaluation."""
    series = []
    for index, run in enumerate(runs):
        before = f"{run.name}: " if len(runs) > 1 else ""
        for split, label in (("train", "train"), ("eval", "held out")):
            steps, values = run.curve(stage, split, metric)
            if steps:
                series.append(
                    Series(
                        x=steps,
                        y=values,
                        label=before + label,
                        colour=colour(index),
                        faint=split == "train",
                        dots=split == "eval",
                    )
                )
    return Chart(title=title, y_label=metric, series=series)


def _all_metrics(runs: Sequence[Run]) -> Figure:
    """A chart for each recorded metric of each stage."""
    recorded: dict[str, set[str]] = {}
    for run in runs:
        for line in run.lines:
            names = {name for name in line if name not in ("stage", "split", "step")}
            recorded.setdefault(line["stage"], set()).update(names)
    charts = [
        _metric_chart(runs, stage, metric, f"{stage}: {metric}")
        for stage, names in recorded.items()
        for metric in sorted(names)
    ]
    return Figure(
        title="All metrics", charts=[chart for chart in charts if chart.series], folded=True
    )


def skipped_updates(run: Run) -> list[str]:
    """A line for each stage of which updates were skipped, as their loss was not finite."""
    last = {line["stage"]: line for line in run.lines if line["split"] == "train"}
    return [
        f"{stage}: {line['skipped']:.0f} of {line['step']:,} updates were not finite and were "
        "skipped"
        for stage, line in last.items()
        if line.get("skipped")
    ]


def _markdown(part: Part) -> str:
    """A part as Markdown."""
    title = getattr(part, "title", "")
    heading = f"## {_plain(title)}\n\n" if title else ""
    match part:
        case Text():
            before = "- " if part.bullets else ""
            return heading + "".join(f"{before}{_plain(line)}\n" for line in part.lines)
        case Table():
            note = f"{part.note}\n\n" if part.note else ""
            return heading + note + _markdown_table(part.header, part.rows, part.words)
        case Figure():
            return f"{heading}![{part.alt}]({part.image})\n"
        case Examples():
            rows = [
                [
                    example.facts,
                    " ".join(example.prompt.split()),
                    "\n".join(
                        f"{name}. {' '.join(response.split())}"
                        for name, response in zip(example.names, example.responses, strict=True)
                    ),
                ]
                for example in part.examples
            ]
            header = ["step and verdict", "prompt", "responses"]
            return heading + _markdown_table(header, rows, words=(0, 1, 2))
    raise TypeError(f"{type(part).__name__} has no Markdown")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Any = (0,)) -> str:
    def line(cells: Sequence[str]) -> str:
        texts = [_plain(cell.replace("|", "\\|").strip()) for cell in cells]
        return "| " + " | ".join(text.replace("\n", "<br>") for text in texts) + " |"

    rule = "".join("---|" if at in words else "---:|" for at in range(len(header)))
    return "\n".join([line(header), f"|{rule}", *map(line, rows)]) + "\n"


def _plain(text: str) -> str:
    """Text in which Markdown sees no HTML."""
    return text.replace("<", "&lt;")
