"""What is said of verdicts, in words and in JSON."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation import Verdicts


def in_words(verdicts: Verdicts) -> list[str]:
    """Lines on order and failures."""
    lines = []
    if verdicts.order_consistency is not None:
        lines.append(
            f"the same winner in both orders: {verdicts.order_consistency:.1%}; the response "
            f"shown first gets {verdicts.first_position_rate:.1%}"
        )
    if failures := verdicts.failures:
        reasons = "; ".join(f"{number:,}: {why}" for why, number in failures.most_common(3))
        lines.append(
            f"{failures.total():,} of {len(verdicts.preference):,} comparisons without a verdict "
            f"({reasons})"
        )
        if failures.total() == len(verdicts.preference):
            raise UserError(f"no verdict at all ({reasons})")
    return lines


def in_numbers(verdicts: Verdicts) -> dict[str, Any]:
    """Order and failures, for results.json."""
    return {
        "order_consistency": verdicts.order_consistency,
        "first_position_rate": verdicts.first_position_rate,
        "failures": dict(verdicts.failures),
    }


def headings(given: argparse.Namespace) -> list[str]:
    """The column of the interval."""
    return [f"{given.confidence:.0%} interval"]


def plain(value: Any) -> Any:
    """What JSON holds; NaN is null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
