"""Fields of configs: their types, their names, and the check of their values."""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro
import tyro.constructors

from jaxalign.errors import UserError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of allowed values of a number; goes into the annotation of its field.

    Attributes:
      interval: "[0, 1)": a square bracket includes its end, a round one does not.
      also: one more value that is allowed.
    """

    interval: str
    also: float | int | None = None

    def __contains__(self, value: float | int) -> bool:
        low, high = map(float, self.interval[1:-1].split(","))
        above = low <= value if self.interval[0] == "[" else low < value
        below = value <= high if self.interval[-1] == "]" else value < high
        return (above and below) or value == self.also

    def __str__(self) -> str:
        return self.interval if self.also is None else f"{self.interval} or {self.also}"


Finite = Annotated[float, Range("(-inf, inf)")]
"""A finite number."""
Positive = Annotated[float, Range("(0, inf)")]
"""A number above 0."""
NonNegative = Annotated[float, Range("[0, inf)")]
"""A number of at least 0."""
Fraction = Annotated[float, Range("(0, 1]")]
"""A number above 0, at most 1."""
Share = Annotated[float, Range("[0, 1]")]
"""A number from 0 to 1."""
BelowOne = Annotated[float, Range("[0, 1)")]
"""A number from 0 to below 1."""
Count = Annotated[int, Range("[0, inf)")]
"""A whole number of at least 0."""
AtLeastOne = Annotated[int, Range("[1, inf)")]
"""A whole number of at least 1."""
Parts = Annotated[int, Range("[1, inf)", also=-1)]
"""A whole number of at least 1, or -1."""
Seed = Annotated[int, Range("[0, 4294967296)")]
"""A whole number from 0 to below 2^32."""


Words = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME[:WEIGHT] ...",
        instance_from_str=" ".join,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
"""A text that the command line takes as one or several words."""


Sources = Annotated[
    tuple[str, ...] | str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="SOURCE[:WEIGHT] ...",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]
"""Sources of records; a config keeps them as a tuple (`listed`), whatever it is given."""


def listed(config: Any, *names: str) -> None:
    """Make tuples of fields that may be given as one text or None; for `__post_init__`."""
    for name in names:
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            value = () if value is None else (value,)
        value = tuple(value)
        if value == ("None",):  # on a command line
            value = ()
        object.__setattr__(config, name, value)


def check(config: Any) -> None:
    """Check that every field of a config, and of nested configs, has its type and range.

    Args:
      config: a dataclass; numbers have a `Range` in their annotation.

    Raises:
      UserError: a field does not; names the first one by its path: "sft.optimizer.b1: ...".
    """
    for field in fields_of(type(config)):
        value = field.of(config)
        if not field.is_config:
            _check_value(field.name, value, field.hint)
        elif not isinstance(value, field.hint):
            raise UserError(
                f"{field.name}: is of type {type(value).__name__}, not {field.hint.__name__}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a config or of one of its nested configs.

    Attributes:
      name: in messages, and on the command line after two dashes: the path with dots, which begins
        at the innermost `short` field.
      path: names of the attributes that lead to it.
      hint: its type, with the annotations of a number.
      is_config: whether it is a nested config.
    """

    name: str
    path: tuple[str, ...]
    hint: Any
    is_config: bool

    def of(self, config: Any) -> Any:
        """Its value in a config."""
        return functools.reduce(getattr, self.path, config)


def short(name: str | None = None) -> Any:
    """For the annotation of a field: its name has no prefix, as in `--loss`.

    Args:
      name: with dashes; None: the attribute's own.
    """
    return tyro.conf.arg(name=name, prefix_name=False)


@functools.cache
def fields_of(cls: type) -> tuple[Field, ...]:
    """All fields of a config, those of nested configs after the nested config itself."""
    return tuple(_fields_of(cls, "", ()))


def _fields_of(cls: type, prefix: str, path: tuple[str, ...]) -> Iterator[Field]:
    for key, hint in typing.get_type_hints(cls, include_extras=True).items():
        annotated = typing.get_origin(hint) is Annotated
        plain, *notes = typing.get_args(hint) if annotated else (hint,)
        alone = [note for note in notes if getattr(note, "prefix_name", None) is False]
        name = (alone[0].name or key).replace("-", "_") if alone else prefix + key
        is_config = dataclasses.is_dataclass(plain)
        yield Field(
            name=name, path=(*path, key), hint=plain if is_config else hint, is_config=is_config
        )
        if is_config:
            yield from _fields_of(typing.cast(type, plain), f"{name}.", (*path, key))


def with_fields(config: Config, **values: Any) -> Config:
    """A copy of a config with other values, by the names that the command line has.

    `with_fields(config, loss="ipo", seed=1, **{"preference.steps": 10})` changes
    `config.preference.loss`, `config.seed` and `config.preference.steps`.

    Args:
      config: a dataclass.
      **values: name of a field -> value.

    Raises:
      UserError: a field is unknown, or the values do not fit together; names the field.
    """
    known = {field.name: field.path for field in fields_of(type(config))}
    for name in values:
        if name not in known:
            raise UserError(f"{name}: no field of {type(config).__name__}")
    return _replaced(config, [(known[name], value) for name, value in values.items()])


def _replaced(config: Any, changes: Sequence[tuple[tuple[str, ...], Any]]) -> Any:
    """A config with values at the ends of paths, of which a longer one goes into a shorter one."""
    values = {}
    for key in dict.fromkeys(path[0] for path, _ in changes):
        present = [value for path, value in changes if path == (key,)] or [getattr(config, key)]
        inner = [(path[1:], value) for path, value in changes if path[0] == key and path[1:]]
        values[key] = _replaced(present[0], inner) if inner else present[0]
    return dataclasses.replace(config, **values)


def _check_value(name: str, value: Any, hint: Any) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check_value(name, value, arguments[0])
        for allowed in arguments[1:]:
            if isinstance(allowed, Range) and value is not None and value not in allowed:
                raise UserError(f"{name}: {value} is not in {allowed}")
    elif origin in (types.UnionType, typing.Union):
        if value is not None:
            _check_value(name, value, arguments[0])
    elif origin is Literal:
        if value not in arguments:
            raise UserError(f"{name}: {value!r} is not one of {', '.join(map(str, arguments))}")
    elif origin is tuple:
        _check_type(name, value, tuple)
        for number, one in enumerate(value):
            _check_value(f"{name}[{number}]", one, arguments[0])
    elif origin is dict:
        _check_type(name, value, dict)
        for key, one in value.items():
            _check_value(f"{name}.{key}", one, arguments[1])
    else:
        _check_type(name, value, hint)


def _check_type(name: str, value: Any, kind: type) -> None:
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name}: {value!r} is of type {type(value).__name__}, not {kind.__name__}")
