"""Configs as JSON in run folders."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.config.fields import fields_of
from jaxalign.config.run import TrainConfig
from jaxalign.errors import UserError
from jaxalign.files import read_json

ALIASES = {"config.preference.entanglement.cure": "reweighting"}
"""Path of a field in an earlier version -> its present name."""


def to_json(config: Any) -> str:
    """The text stored in a run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(text: str) -> TrainConfig:
    """The config that `to_json` wrote.

    Raises:
      UserError: it is not JSON, or a field is unknown or out of its range.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"config.json: invalid JSON: {error}") from None
    return _build(TrainConfig, _renamed(fields), "config")


def read_config(path: Path) -> TrainConfig:
    """The config in a run folder.

    Raises:
      UserError: the file cannot be read, or is not the config of a run; names the file.
    """
    fields = read_json(path, "config of a run")
    try:
        if missing := [name for name in ("name", "model", "data", "seed") if name not in fields]:
            raise UserError(f"no {', '.join(missing)}")
        return _build(TrainConfig, _renamed(fields), "config")
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not the config of a run ({error}); restore it, or remove the folder"
        ) from None


def _renamed(fields: Any) -> Any:
    """The fields of a config that an earlier version wrote, by their present names."""
    if not isinstance(fields, Mapping):
        return fields
    fields = dict(fields)
    if "strings_as_chat" in fields:
        plain = "auto" if fields.get("model") == "embedded" else "never"  # the same as it is now
        fields.setdefault("chat", "always" if fields.pop("strings_as_chat") else plain)
        fields.pop("strings_as_chat", None)
    for field in fields_of(TrainConfig):  # what a stage has was beside the stages once
        if field.name in fields and len(field.path) == 2:
            stage, key = field.path
            fields[stage] = {key: fields.pop(field.name), **fields.get(stage, {})}
    return fields


def _build(cls: Any, value: Any, name: str) -> Any:
    """A value of the annotated type from its JSON form."""
    if dataclasses.is_dataclass(cls):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}: {value!r} is not an object with fields")
        hints = typing.get_type_hints(cls)
        value = {ALIASES.get(f"{name}.{key}", key): item for key, item in value.items()}
        if unknown := sorted(set(value) - set(hints)):
            raise UserError(f"{name}: unknown field {', '.join(unknown)}")
        return typing.cast(Any, cls)(
            **{key: _build(hints[key], item, f"{name}.{key}") for key, item in value.items()}
        )
    origin = typing.get_origin(cls)
    if isinstance(value, list):  # of a tuple
        return tuple(value)
    if origin in (types.UnionType, typing.Union) and isinstance(value, Mapping):
        return _build(typing.get_args(cls)[0], value, name)
    return value
