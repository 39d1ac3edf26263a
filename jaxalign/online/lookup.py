"""Online algorithms by name: built-in, or a function in a user's file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.modules import (
    check_options,
    errors_in_one_line,
    find_function,
    parameters_of,
    users_code,
)
from jaxalign.online.algorithm import Algorithm
from jaxalign.online.algorithms import ALGORITHMS


def find_algorithm(name: str, options: Mapping[str, float]) -> Algorithm:
    """The online algorithm of that name, with its hyperparameters.

    Args:
      name: an entry of `ALGORITHMS`, or a user's function as "FILE.py:FUNCTION".
      options: its hyperparameters; one whose default is an `int` must be a whole number.

    Raises:
      UserError: there is no such algorithm, or an option is unknown, missing or out of range.
    """
    known = ALGORITHMS.get(name)
    if known is None and ":" not in name:
        raise UserError(
            f"rollout.algorithm: {name!r} is neither FILE.py:FUNCTION nor one of "
            f"{', '.join(ALGORITHMS)}"
        )
    make: Callable[..., Any] = known or find_function(name, "algorithm")
    parameters = parameters_of(make, f"rollout.algorithm: {name}")
    check_options(parameters, options, f"rollout.options: {name}", "--rollout.options")
    whole = {one.name for one in parameters if isinstance(one.default, int)}
    for key, value in options.items():  # options are numbers on the command line
        if key in whole and value != int(value):
            raise UserError(f"rollout.options: {key}: {value} is not a whole number")
    values = {key: int(x) if key in whole else float(x) for key, x in options.items()}
    with users_code(f"rollout.algorithm: {name}"):
        algorithm = make(**values)
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"rollout.algorithm: {name} returned {type(algorithm).__name__}")
    if known is not None:
        return algorithm
    loss = errors_in_one_line(algorithm.loss, f"rollout.algorithm: {name}: loss")
    return dataclasses.replace(algorithm, loss=loss)
