"""What the row of a watched run says: ends, means and parts of changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.entanglement.conditions import CASES, case_of_changes


def held_out(row: Mapping[str, Any], metric: str) -> np.ndarray:
    """A held-out metric at the evaluations of a run."""
    return np.array(row["held_out"][metric]["value"])


def change(row: Mapping[str, Any], side: str) -> np.ndarray:
    """The changes of a held-out log-prob from the start."""
    values = held_out(row, f"logps/{side}")
    return values - values[0]


def mean(row: Mapping[str, Any], metric: str) -> float:
    """The mean over the watched steps; NaN if the metric is never defined."""
    one = row["training"].get(f"entanglement/{metric}")
    return float(np.mean(one["value"])) if one else float("nan")


def per_step(row: Mapping[str, Any], part: str, side: str, pairs_of: str = "") -> float:
    """The mean part of a change in the steps with a ledger."""
    return mean(row, f"ledger/{pairs_of}{part}_{side}")


def outcome(row: Mapping[str, Any]) -> str:
    """Where the held-out log-probs went, as one of the cases."""
    ends = [jnp.array([change(row, side)[-1]]) for side in ("chosen", "rejected")]
    return CASES[int(case_of_changes(*ends)[0])]


def at_accuracy(row: Mapping[str, Any], accuracy: float) -> dict[str, float] | None:
    """Step and changes where the held-out accuracy first reaches a value; None: nowhere."""
    values = held_out(row, "rewards/accuracies")
    steps = row["held_out"]["rewards/accuracies"]["step"]
    reached = np.flatnonzero(values >= accuracy)
    if not len(reached):
        return None
    last = max(1, int(reached[0]))
    fraction = (accuracy - values[last - 1]) / max(values[last] - values[last - 1], 1e-9)

    def between(curve: Sequence[float] | np.ndarray) -> float:
        return float(curve[last - 1] + fraction * (curve[last] - curve[last - 1]))

    return {
        "step": between(steps),
        "chosen": between(change(row, "chosen")),
        "rejected": between(change(row, "rejected")),
    }
