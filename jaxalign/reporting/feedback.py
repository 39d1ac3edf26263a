"""The feedback stage in a report: held-out rewards of both labels, and how well they separate."""

from collections.abc import Sequence

from jaxalign.reporting.charts import Chart, Series, colour
from jaxalign.reporting.runs import Run, before_and_after

STAGE = "feedback"
ROWS = (
    ("loss", "loss", "{:z.4f}"),
    ("rewards/auc", "AUC of the rewards", "{:z.3f}"),
    ("rewards/accuracies", "accuracy", "{:z.3f}"),
    ("calibration/error", "calibration error", "{:z.3f}"),
    ("rewards/chosen", "reward, desirable", "{:z.4f}"),
    ("rewards/rejected", "reward, undesirable", "{:z.4f}"),
    ("logps/chosen", "log-prob, desirable (nats)", "{:z.2f}"),
    ("logps/rejected", "log-prob, undesirable (nats)", "{:z.2f}"),
    ("statistics/kl", "zero point (nats)", "{:z.3f}"),
)
"""Held-out metric, its name in a table and its format."""


def has_stage(run: Run) -> bool:
    """Whether a run has reached this stage."""
    return run.has_stage(STAGE)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per metric; before and after, or both in a column per run."""
    return before_and_after(runs, STAGE, ROWS, "held-out labelled responses")


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Held-out rewards of both labels and AUC over the steps of the stage."""
    several = len(runs) > 1

    def curve(index: int, metric: str, label: str, *, dashed: bool = False) -> Series:
        name = " ".join(filter(None, (runs[index].name if several else "", label)))
        steps, values = runs[index].curve(STAGE, "eval", metric)
        return Series(x=steps, y=values, label=name, colour=colour(index), dots=True, dashed=dashed)

    sides = (("chosen", "desirable"), ("rejected", "undesirable"))
    return [
        Chart(
            title="Reward",
            series=[
                curve(at, f"rewards/{side}", label, dashed=side == "rejected")
                for at in range(len(runs))
                for side, label in sides
            ],
            y_label="beta log-ratio",
        ),
        Chart(
            title="AUC of the rewards",
            series=[curve(at, "rewards/auc", "") for at in range(len(runs))],
            y_label="desirable above undesirable",
            rule=0.5,
        ),
    ]
