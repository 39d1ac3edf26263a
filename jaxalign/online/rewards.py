"""Rewards from Python functions: verifiable answers, formats, lengths."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxalign.errors import UserError
from jaxalign.modules import find_function, parameters_of, users_code

OPTION = "rollout.reward"
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A function (prompts, responses, fields of the records by name) -> rewards, and its weight."""

    function: Callable[..., Any]
    spec: str
    """FILE.py:FUNCTION, for messages."""
    weight: float
    fields: tuple[str, ...]
    """The fields that it names."""
    needed: tuple[str, ...]
    """Those without a default."""
    all_fields: bool
    """Whether it takes every other field, too."""

    @property
    def name(self) -> str:
        """Of the function."""
        return self.spec.rpartition(":")[2]

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Mapping[str, Any]],
    ) -> Float64[np.ndarray, " n"]:
        """The rewards of n responses.

        Args:
          prompts: texts.
          responses: texts.
          records: the fields of each prompt's record.

        Raises:
          UserError: the function raises, or does not return n finite numbers.
        """
        columns = {name: [record.get(name) for record in records] for name in self._named(records)}
        with users_code(f"{OPTION}: {self.spec}"):
            values = self.function(list(prompts), list(responses), **columns)
        what = f"{OPTION}: {self.spec} returned"
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
            raise UserError(f"{what} a {type(values).__name__}, not a list of numbers")
        if len(values) != len(responses):
            raise UserError(f"{what} {len(values)} rewards for {len(responses)} responses")
        rewards = [x.item() if hasattr(x, "item") and np.ndim(x) == 0 else x for x in values]
        for reward, prompt, response in zip(rewards, prompts, responses, strict=True):
            shown = f"for the response {_short(response)} to {_short(prompt)}"
            if not isinstance(reward, Real):
                raise UserError(f"{what} a {type(reward).__name__}, not a number, {shown}")
            if not math.isfinite(reward):
                raise UserError(f"{what} {reward} {shown}")
        return np.array(rewards, np.float64)

    def _named(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """The fields to pass: optional ones only where some record has them."""
        known = dict.fromkeys(name for record in records for name in record)
        if self.all_fields:
            taken = list(inspect.signature(self.function).parameters)[:2]
            return [name for name in known if name not in taken]
        return [name for name in self.fields if name in known or name in self.needed]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def split_weight(spec: str) -> tuple[str, float]:
    """The name and the weight of "FILE.py:FUNCTION" (1) or "FILE.py:FUNCTION:WEIGHT"."""
    name, _, last = spec.rpartition(":")
    if ":" not in name:
        return spec, 1.0
    try:
        return name, float(last)
    except ValueError:
        return spec, 1.0


def reward_function(spec: str) -> RewardFunction:
    """The reward function of "FILE.py:FUNCTION" or "FILE.py:FUNCTION:WEIGHT".

    Raises:
      UserError: there is none, it takes fewer than two arguments, or the weight is not finite.
    """
    name, weight = split_weight(spec)
    if not math.isfinite(weight):
        raise UserError(f"{OPTION}: {spec}: the weight {weight} is not finite")
    function = find_function(name, "reward")
    parameters = parameters_of(function, f"{OPTION}: {name}")
    if len([one for one in parameters[:2] if one.kind in POSITIONAL]) < 2:
        raise UserError(
            f"{OPTION}: {name} must take (prompts, responses), and the fields of records that it "
            "reads by name"
        )
    named = [one for one in parameters[2:] if one.kind in (*POSITIONAL[1:], one.KEYWORD_ONLY)]
    return RewardFunction(
        function=function,
        spec=name,
        weight=weight,
        fields=tuple(one.name for one in named),
        needed=tuple(one.name for one in named if one.default is one.empty),
        all_fields=any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


@dataclass(frozen=True, kw_only=True)
class RewardFunctions:
    """A weighted sum of reward functions, in the place of an annotator."""

    functions: tuple[RewardFunction, ...]

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Mapping[str, Any]],
    ) -> dict[str, np.ndarray]:
        """The rewards of each function by name, without weights; arguments as of one function."""
        return {one.name: one(prompts, responses, records) for one in self.functions}

    def total(self, rewards: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of the functions' rewards."""
        return np.sum([one.weight * rewards[one.name] for one in self.functions], axis=0)

    def check_record(self, record: Mapping[str, Any], source: str) -> None:
        """Check that a record has the fields that the functions need.

        Args:
          record: fields by name.
          source: file and line, for the message.

        Raises:
          UserError: a field is missing.
        """
        for one in self.functions:
            if absent := [name for name in one.needed if name not in record]:
                raise UserError(
                    f"{source}: no field {', '.join(absent)}, which {OPTION} {one.spec} reads; it "
                    f"has {', '.join(record) or 'none'}"
                )


def reward_functions(specs: Sequence[str]) -> RewardFunctions:
    """The reward functions of several names, in the form of `reward_function`.

    Raises:
      UserError: one is wrong, or two have the same name.
    """
    functions = tuple(map(reward_function, specs))
    [(name, often), *_] = Counter(one.name for one in functions).most_common()
    if often > 1:
        raise UserError(f"{OPTION}: {often} functions have the name {name}; rename one")
    return RewardFunctions(functions=functions)


def preference_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Preference for the first by reward: 1 if it is higher, 1/2 at a tie, else 0."""
    return 0.5 + 0.5 * np.sign(first - second)
