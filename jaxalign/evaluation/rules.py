"""Judging by a rule: a function of the user's own."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxalign.errors import UserError
from jaxalign.evaluation.verdicts import Annotator, Answer, Verdicts
from jaxalign.modules import find_function, in_one_line, users_code

ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A judge that calls a function for every response, or for every pair.

    Attributes:
      function: (prompt, response) -> score, of which the higher wins and equals tie; or
        (prompt, first, second) -> P(first is better).
      name: for messages.
      order_free: whether it scores single responses.
    """

    function: Callable[..., Any]
    name: str
    order_free: bool
    identity: str | None = None  # its answers change with its code, and cost little

    def answers(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[Answer]:
        """As in `Judge`.

        Raises:
          UserError: every answer failed.
        """
        failed: list[Answer] = []
        for number, shown in enumerate(zip(prompts, first, second, strict=True)):
            preference, reason = self._scored(*shown) if self.order_free else self._asked(*shown)
            answer = Answer(number=number, preference=preference, reason=reason)
            if reason:
                failed.append(answer)
            yield answer
        if prompts and len(failed) == len(prompts):
            raise self._fails(prompts[0], len(failed), failed[0].reason)

    def rewards(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """The score of each response, of a rule that scores single ones; NaN where there is none.

        Args:
          prompts: n texts.
          responses: one to each.

        Raises:
          UserError: every call failed.
        """
        asked = [called(self.function, *shown) for shown in zip(prompts, responses, strict=True)]
        if asked and all(reason for _, reason in asked):
            raise self._fails(prompts[0], len(asked), asked[0][1])
        return np.array([score for score, _ in asked])

    def _fails(self, prompt: str, number: int, reason: str) -> UserError:
        short = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
        return UserError(f"{self.name} fails on all {number}: {reason}; first on prompt {short!r}")

    def _scored(self, prompt: str, first: str, second: str) -> tuple[float, str]:
        scores = []
        for response in (first, second):
            score, reason = called(self.function, prompt, response)
            if reason:
                return math.nan, reason
            scores.append(score)
        return 0.5 + 0.5 * float(np.sign(scores[0] - scores[1])), ""

    def _asked(self, prompt: str, first: str, second: str) -> tuple[float, str]:
        probability, reason = called(self.function, prompt, first, second)
        if not reason and not 0 <= probability <= 1:
            return math.nan, "it returns a probability outside [0, 1]"
        return probability, reason


def called(function: Callable[..., Any], *texts: str) -> tuple[float, str]:
    """What a function of the user's says of texts; a failure is tried once more.

    Args:
      function: returns a finite number; true and false are 1 and 0.
      *texts: its arguments.

    Returns:
      The number and "", or NaN and why there is none.
    """
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            value = function(*texts)
        except Exception as error:
            reason = f"it raises {in_one_line(error)}"
            continue
        if hasattr(value, "item") and np.ndim(value) == 0:
            value = value.item()
        if hasattr(value, "shape") and np.ndim(value):
            reason = f"it returns an array of shape {np.shape(value)}, not a number"
        elif isinstance(value, list | tuple):
            reason = f"it returns a {type(value).__name__} of {len(value)}, not a number"
        elif not isinstance(value, Real):
            reason = f"it returns a {type(value).__name__}, not a number"
        elif not math.isfinite(value):
            reason = "it returns a number that is not finite"
        else:
            return float(value), ""
    return math.nan, reason


@dataclass(frozen=True, kw_only=True)
class RuleAnnotator:
    """The preferences and the scores of a rule that scores single responses."""

    rule: Rule
    annotator: Annotator

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """As in `Annotator`."""
        return self.annotator.preferences(prompts, first, second)

    def rewards(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """As `Rule.rewards`."""
        return self.rule.rewards(prompts, responses)


def rule(name: str) -> Rule:
    """The rule of "FILE.py:FUNCTION".

    Raises:
      UserError: there is none, or it takes neither two nor three arguments.
    """
    function = find_function(name, "rule")
    with users_code(f"rule: {name}"):
        parameters = inspect.signature(function).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) not in (2, 3):
        raise UserError(
            f"rule: {name} takes {len(needed)} arguments; a rule takes (prompt, response) and "
            "returns a score, or (prompt, first, second) and returns P(first is better)"
        )
    return Rule(function=function, name=f"rule {name}", order_free=len(needed) == 2)
