"""Parameters of which only some are in the default run; `make test-slow` has the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`: those that are not among `quick` are marked slow.

    Args:
      values: of one parameter, or tuples of several.
      quick: the few that use every mechanism.

    Raises:
      ValueError: one of `quick` is not among the values.
    """
    values, quick = list(values), list(quick)
    for one in quick:
        if one not in values:
            raise ValueError(f"quick: {one!r} is none of the values")
    return [one if one in quick else slow(one) for one in values]


def slow(value: Any) -> Any:
    """One value, or a tuple of several parameters' values, marked slow."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
