"""Dynamic sampling: new responses for prompts whose responses all have the same reward.

Yu et al., 2025, arXiv:2503.14476, section 3.2.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxalign.online.sampler import Annotated, Sampled

T = TypeVar("T", Sampled, Annotated)


def is_flat(reward: np.ndarray) -> np.ndarray:
    """Whether all responses to a prompt have the same reward: [prompts, samples] -> [prompts].

    A prompt without a verdict (NaN) is not flat.
    """
    return np.ptp(reward, axis=1) == 0


def choose(flat: np.ndarray) -> np.ndarray:
    """Rows of the next draw: the flat prompts, repeated until they fill the batch.

    Args:
      flat: whether each prompt of the batch is flat; if none is, all are drawn for the sake of the
        other processes.
    """
    rows = np.flatnonzero(flat) if flat.any() else np.arange(len(flat))
    return np.resize(rows, len(flat))


def replaced(
    before: tuple[Sampled, Annotated],
    fresh: tuple[Sampled, Annotated],
    flat: np.ndarray,
    rows: np.ndarray,
) -> tuple[Sampled, Annotated]:
    """The responses, in which flat prompts have their first new group with a spread of rewards.

    Args:
      before: all prompts' responses and annotations.
      fresh: the new ones.
      flat: whether each prompt is flat.
      rows: prompt of each new row, from `choose`.
    """
    assert fresh[1].reward is not None
    useful = ~is_flat(fresh[1].reward) & np.isfinite(fresh[1].reward).all(1)
    source = np.full(len(flat), -1)
    for row in np.flatnonzero(useful)[::-1]:  # the first is written last
        if flat[rows[row]]:
            source[rows[row]] = row
    return _merged(before[0], fresh[0], source), _merged(before[1], fresh[1], source)


def _merged(old: T, new: T, source: np.ndarray) -> T:
    """Every field with the rows of `new` at `source`, and of `old` where that is -1."""

    def one(x: object, y: object) -> object:
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            at = source.reshape(-1, *(1,) * (x.ndim - 1))
            return np.where(at >= 0, y[source], x)
        if isinstance(x, dict) and isinstance(y, dict):
            return {name: one(x[name], y[name]) for name in x}
        if isinstance(x, Sequence) and isinstance(y, Sequence) and len(x):
            return [y[at] if at >= 0 else x[row] for row, at in enumerate(source)]
        return x

    values = {
        field.name: one(getattr(old, field.name), getattr(new, field.name))
        for field in dataclasses.fields(old)
    }
    return dataclasses.replace(old, **values)
