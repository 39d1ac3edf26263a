"""The rows of a study: a small JSON file for every finished run, so that none is done twice."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The finished runs of a study, by name."""

    folder: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def __getitem__(self, name: str) -> dict[str, Any]:
        return read_json(self._path(name), "row of a study")

    def names(self) -> list[str]:
        """Names of all rows."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Write a row, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name), shortened(dict(row)))
        print(f"row {self.folder.name}/{name}", flush=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def same_options(path: Path, own: Mapping[str, Any]) -> None:
    """Check that rows were made with the same models and sizes; what is new is kept.

    Args:
      path: file that keeps them, beside the rows.
      own: those of this command.

    Raises:
      UserError: the rows were made with others.
    """
    known = read_json(path, "options of a study") if path.is_file() else {}
    if changed := [name for name in own if name in known and known[name] != own[name]]:
        raise UserError(
            f"{path}: its rows were made with another {', '.join(changed)}; set --rows to another "
            "folder"
        )
    if own.keys() - known.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**known, **own})


def models_of(**paths: str | Path | None) -> dict[str, str]:
    """The names of the models that are given, for `same_options`."""
    return {name: Path(path).name for name, path in paths.items() if path is not None}


def shortened(value: Any) -> Any:
    """The same JSON value, its numbers with five digits."""
    if isinstance(value, dict):
        return {name: shortened(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shortened(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
