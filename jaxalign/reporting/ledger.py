"""Where the changes of log-probs came from, summed over a run: a table and a figure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jaxalign.reporting.charts import Chart, Figure, Series
from jaxalign.reporting.heat_map import readable
from jaxalign.reporting.page import Part, Table
from jaxalign.reporting.runs import Run

PARTS = {
    "own": ("#4c9f70", "own gradients"),
    "others": ("#dd8452", "other pairs"),
    "optimiser": ("#8172b3", "optimiser"),
    "curvature": ("#7f7f7f", "curvature"),
    "realised": ("#1f77b4", "together"),
}
"""Part of a change in the metrics, its colour and its name."""
PAIRS = {"batch": "pairs of the batch", "held_out": "held-out pairs"}
SIDES = ("chosen", "rejected")
UP, DOWN = "#4c9f70", "#c44e52"
SHOWN_TOKENS = 8

TokenRow = Mapping[str, Any]
"""A token that moved: `token`, `count`, and the sums `gradient`, `optimiser` and `curvature`."""


@dataclass(frozen=True, kw_only=True)
class StepLedger:
    """The ledger of one update, outside a run."""

    step: str
    """What made it: loss, optimiser, learning rate."""
    pairs: Mapping[str, Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]]]
    """For each name of `PAIRS`: source, and parts of the changes of chosen and rejected."""
    tokens: Mapping[str, Mapping[str, Sequence[TokenRow]]]
    """For each name of `PAIRS` and each side: the tokens that moved most."""


def step_parts(ledger: StepLedger) -> list[Part]:
    """The tables and the figures of one update: means, tokens, and every pair."""
    names = {"batch": "pairs of the batch", "held_out": "pairs outside the batch"}
    columns = [label for _, label in PARTS.values()]
    means, single = [], []
    for name, rows in ledger.pairs.items():
        _, *both = zip(*rows, strict=True)
        for side, of_side in zip(SIDES, both, strict=True):
            changes = list(map(_parts_of, of_side))
            average = [sum(column) / len(rows) for column in zip(*changes, strict=True)]
            means.append([f"{side}, {names[name]}", *map("{:+z.4f}".format, average)])
        single += [
            [place, side, names[name], *map("{:+z.4f}".format, _parts_of(parts))]
            for place, *both in rows
            for side, parts in zip(SIDES, both, strict=True)
        ]
    bars = [
        token_chart(rows, f"Tokens of {side}, {names[name]}")
        for name, sides in ledger.tokens.items()
        for side, rows in sides.items()
    ]
    note = (
        f"One update ({ledger.step}); changes of log-probs in nats, means over the pairs. To first "
        "order, from the pair's own two gradients, from the other pairs of the batch, and from the "
        "optimiser (momentum, preconditioning, decay, rounding); and the rest, curvature."
    )
    title = "Where the change of one update comes from"
    return [
        Table(title=title, note=note, header=["", *columns], rows=means),
        Figure(charts=bars, image="ledger.png", alt="tokens that moved most"),
        Table(
            title="The same for every pair",
            header=["pair", "side", "", *columns],
            rows=single,
            words=(0, 1, 2),
        ),
    ]


def _parts_of(parts: Mapping[str, float]) -> list[float]:
    """The four parts and their sum."""
    return [*parts.values(), sum(parts.values())]


def has_ledger(run: Run) -> bool:
    """Whether the run kept a ledger."""
    return bool(_changes(run, "batch", "realised", "chosen")[0])


def table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the sum of each part over the steps with a ledger, in nats per pair."""
    watched = [name for name in PAIRS if _changes(run, name, "realised", "chosen")[0]]
    rows = []
    for part, (_, label) in PARTS.items():
        curves = [_changes(run, name, part, side)[1] for name in watched for side in SIDES]
        rows.append([label, *(f"{sum(values):+z.2f}" if values else "" for values in curves)])
    steps = len(_changes(run, "batch", "realised", "chosen")[0])
    columns = [f"{side}, {PAIRS[name]}" for name in watched for side in SIDES]
    return [f"sum over {steps:,} steps", *columns], rows


def charts(run: Run, pairs_of: str) -> list[Chart]:
    """Sums of the parts over the steps, and the tokens that moved most; of chosen and rejected.

    Args:
      run: with a ledger.
      pairs_of: a name of `PAIRS`; without a ledger of these pairs there are no charts.
    """
    if not _changes(run, pairs_of, "realised", "chosen")[0]:
        return []
    moved = _tokens(run, pairs_of)
    return [
        *(_sums(run, pairs_of, side) for side in SIDES),
        *(token_chart(moved[side], f"Tokens of {side} that moved most") for side in moved),
    ]


def token_chart(rows: Sequence[TokenRow], title: str) -> Chart:
    """The tokens whose log-probs moved most, as bars.

    Args:
      rows: tokens, each once.
      title: of the chart.
    """
    change = {row["token"]: row["gradient"] + row["optimiser"] + row["curvature"] for row in rows}
    count = {row["token"]: row["count"] for row in rows}
    names = sorted(change, key=lambda token: -abs(change[token]))[:SHOWN_TOKENS]
    series = [
        Series(
            kind="bars",
            x=[at for at, name in enumerate(names) if (change[name] >= 0) == rises],
            y=[change[name] for name in names if (change[name] >= 0) == rises],
            colour=UP if rises else DOWN,
        )
        for rises in (True, False)
    ]
    return Chart(
        title=title,
        series=series,
        x_label="token, and how often it occurred",
        y_label="sum of its changes (nats)",
        x_names=[f"{readable(name)} ×{count[name]}" for name in names],
        rule=0.0,
    )


def _sums(run: Run, pairs_of: str, side: str) -> Chart:
    series = []
    for part, (shade, label) in PARTS.items():
        steps, values = _changes(run, pairs_of, part, side)
        if steps:
            whole = part == "realised"
            sums = list(accumulate(values))
            series.append(Series(x=steps, y=sums, label=label, colour=shade, dashed=whole))
    return Chart(
        title=f"{side.capitalize()}, {PAIRS[pairs_of]}",
        series=series,
        y_label="sum of changes (nats per pair)",
        rule=0.0,
    )


def _changes(run: Run, pairs_of: str, part: str, side: str) -> tuple[list[int], list[float]]:
    before = "" if pairs_of == "batch" else f"{pairs_of}/"
    return run.curve("preference", "train", f"entanglement/ledger/{before}{part}_{side}")


def _tokens(run: Run, pairs_of: str) -> dict[str, list[TokenRow]]:
    """The sums over the steps of the tokens in `ledger.jsonl`; empty without the file."""
    path = run.folder / "ledger.jsonl"
    if not path.is_file():
        return {}
    sums: dict[str, dict[str, dict[str, Any]]] = {side: {} for side in SIDES}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # the last one may be cut off
        entry = json.loads(line)
        if entry["pairs_of"] != pairs_of:
            continue
        for side, of_tokens in sums.items():
            for row in entry["tokens"][side]:
                known = of_tokens.setdefault(row["token"], dict.fromkeys(row, 0))
                for name, value in row.items():
                    known[name] = value if name == "token" else known[name] + value
    return {side: list(of_tokens.values()) for side, of_tokens in sums.items()}
