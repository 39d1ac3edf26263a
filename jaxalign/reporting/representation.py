"""The representation stage in a report: how far hidden states moved, and held-out pairs."""

from collections.abc import Sequence

from jaxalign.reporting.charts import Chart, Series, colour
from jaxalign.reporting.runs import Run, before_and_after

STAGE = "representation"
ROWS = (
    ("loss", "distance to the target, per token", "{:z.4f}"),
    ("pattern/projection", "moved along the difference (alpha when complete)", "{:z.3f}"),
    ("pattern/cosine", "cosine of the move and the difference", "{:z.3f}"),
    ("pattern/norm", "norm of the difference", "{:z.3f}"),
    ("pattern/drift", "norm of the move", "{:z.3f}"),
    ("pattern/base_norm", "norm of the base's states", "{:z.3f}"),
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("rewards/margins", "margin (nats)", "{:z.3f}"),
    ("logps/chosen", "chosen log-prob (nats)", "{:z.2f}"),
    ("logps/rejected", "rejected log-prob (nats)", "{:z.2f}"),
    ("kl", "KL to base (nats/token)", "{:z.4f}"),
)
"""Held-out metric, its name in a table and its format."""


def has_stage(run: Run) -> bool:
    """Whether a run has reached this stage."""
    return run.has_stage(STAGE)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per metric; before and after, or both in a column per run."""
    return before_and_after(runs, STAGE, ROWS, "held-out responses and pairs")


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Held-out distance, projection and log-probs over the steps of the stage."""

    def curve(index: int, metric: str, label: str, *, dashed: bool = False) -> Series:
        steps, values = runs[index].curve(STAGE, "eval", metric)
        return Series(
            x=steps, y=values, label=label, colour=colour(index), dots=True, dashed=dashed
        )

    several = len(runs) > 1
    names = [run.name if several else "" for run in runs]
    return [
        Chart(
            title="Distance to the target",
            series=[curve(at, "loss", name) for at, name in enumerate(names)],
            y_label="per token",
        ),
        Chart(
            title="Moved along the difference",
            series=[curve(at, "pattern/projection", "") for at in range(len(runs))],
            y_label="alpha when complete",
        ),
        Chart(
            title="Log-prob of the response",
            series=[
                curve(
                    at,
                    f"logps/{side}",
                    f"{name}: {side}" if several else side,
                    dashed=side == "rejected",
                )
                for at, name in enumerate(names)
                for side in ("chosen", "rejected")
            ],
            y_label="nats, summed over tokens",
        ),
    ]
