"""Which loss or online algorithm a name on the command line stands for."""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.losses import (
    BATCH_COUPLED,
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    TOKEN_LOSSES,
    TokenLogProbs,
)
from jaxalign.modules import find_function
from jaxalign.online import ALGORITHMS, Algorithm
from jaxalign.training.objectives import couples_pairs


def find_loss(name: str, options: dict[str, Any]) -> tuple[Any, bool, bool]:
    """A loss of the table, or a function of the user's own: "FILE.py:FUNCTION".

    Args:
      name: a row of the table, or file (or module) and function with a colon between.
      options: hyperparameters that it must take.

    Returns:
      The function, whether it reads tokens (its first argument is annotated `TokenLogProbs`), and
      whether a pair's value depends on its batch.
    """
    if name in PREFERENCE_LOSSES:
        return PREFERENCE_LOSSES[name], False, name in BATCH_COUPLED
    if name in TOKEN_LOSSES:
        return TOKEN_LOSSES[name], True, False
    if name in REWARD_LOSSES:
        return REWARD_LOSSES[name], False, False
    loss: Any = find_function(name, "loss")
    first, *rest = inspect.signature(loss).parameters.values()
    if unknown := sorted(set(options) - {parameter.name for parameter in rest}):
        known = ", ".join(parameter.name for parameter in rest) or "none"
        raise UserError(f"loss_options: {name} has no {', '.join(unknown)}; it has {known}")
    if first.annotation is TokenLogProbs:
        return loss, True, False
    try:
        return loss, False, couples_pairs(loss, options)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"loss: {name} fails on a batch of two pairs: {reason[0]}") from error


def find_algorithm(name: str, options: Mapping[str, float]) -> Algorithm:
    """An online algorithm of the table, or a function of the user's own: "FILE.py:FUNCTION".

    Raises:
      UserError: there is none of that name, or it lacks an option.
    """
    found: Any = ALGORITHMS.get(name)
    if found is None:
        if ":" not in name:
            raise UserError(
                f"rollout.algorithm: {name!r} is neither FILE.py:FUNCTION nor one of "
                f"{', '.join(ALGORITHMS)}"
            )
        found = find_function(name, "algorithm")
    parameters = inspect.signature(found).parameters
    if unknown := sorted(set(options) - set(parameters)):
        known = ", ".join(parameters) or "none"
        raise UserError(f"rollout.options: {name} has no {', '.join(unknown)}; it has {known}")
    whole = {  # options are numbers on the command line; counts are whole ones
        key: int(value) if isinstance(parameters[key].default, int) else float(value)
        for key, value in options.items()
    }
    algorithm = found(**whole)
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"rollout.algorithm: {name} returned {type(algorithm).__name__}")
    return algorithm
