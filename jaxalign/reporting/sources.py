"""The held-out records of each source of a mixture, before and after every stage."""

from collections.abc import Sequence

from jaxalign.reporting.runs import STAGES, Run

BEFORE = "by_source/"
COLUMNS = (
    ("loss", "loss", "{:z.4f}"),
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("rewards/auc", "AUC", "{:z.3f}"),
    ("rewards/margins", "reward margin", "{:z.3f}"),
    ("logps/chosen", "chosen log-prob (nats)", "{:z.2f}"),
    ("logps/rejected", "rejected log-prob (nats)", "{:z.2f}"),
    ("kl", "KL (nats/token)", "{:z.4f}"),
)
"""Held-out metric, its name in a table and its format."""


def labels(run: Run, stage: str) -> list[str]:
    """The sources of a stage whose held-out records are evaluated apart."""
    names = (
        name.removeprefix(BEFORE).partition("/")[0]
        for line in run.lines
        if line.get("stage") == stage and line.get("split") == "eval"
        for name in line
        if name.startswith(BEFORE)
    )
    return list(dict.fromkeys(names))


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per run, stage and source; columns that nothing has are left out."""
    lines = [
        (run, stage, label) for run in runs for stage in STAGES for label in labels(run, stage)
    ]
    cells = [
        [
            " → ".join(map(form.format, values))
            if (values := run.first_and_last(stage, f"{BEFORE}{label}/{metric}"))
            else ""
            for metric, _, form in COLUMNS
        ]
        for run, stage, label in lines
    ]
    kept = [at for at in range(len(COLUMNS)) if any(row[at] for row in cells)]
    several = len(runs) > 1
    header = [*(["run"] if several else []), "stage", "source", *(COLUMNS[at][1] for at in kept)]
    rows = [
        [*([run.name] if several else []), stage, label, *(row[at] for at in kept)]
        for (run, stage, label), row in zip(lines, cells, strict=True)
    ]
    return header, rows
