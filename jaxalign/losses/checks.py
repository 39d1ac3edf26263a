"""Checks of hyperparameters, in one line with the name, the value and the allowed range.

A hyperparameter that is an argument of a compiled program has no value while it is traced, and is
not checked: check it before the call.
"""

from typing import TypeAlias

from jax.core import Tracer
from jaxtyping import Array, Float

from jaxalign.errors import UserError

Strength: TypeAlias = float | Float[Array, ""]
"""A hyperparameter that a compiled program may take as an argument."""


def positive(**values: Strength) -> None:
    """Refuse a hyperparameter that is not above zero."""
    for name, value in values.items():
        if not isinstance(value, Tracer) and not value > 0:
            raise UserError(f"{name} = {value}: must be > 0")


def non_negative(**values: Strength) -> None:
    """Refuse a hyperparameter below zero."""
    for name, value in values.items():
        if not isinstance(value, Tracer) and not value >= 0:
            raise UserError(f"{name} = {value}: must be >= 0")


def flip_probability(*, label_smoothing: float) -> None:
    """Refuse a probability of flipped labels outside [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing = {label_smoothing}: must be in [0, 0.5)")
