"""Experts that a file stacks into one tensor, read as if each had its own."""

import re
from typing import Any

import numpy as np

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import FAMILIES

STACKED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$")


class SeparateExperts:
    """Tensor files whose stacked experts have the names and shapes of separate ones.

    transformers 5 holds [experts, outputs, inputs], gate and up one above the other, and can write
    them so; earlier versions, and its usual `save_pretrained`, write a tensor per expert.

    Args:
      files: to read from.
      parts: name of a separate tensor -> the stacked one, the expert, and the first row and number
        of rows of it there.
      renamed: name of another tensor -> its name in the files.
    """

    def __init__(
        self, files: Any, parts: dict[str, tuple[str, int, int, int]], renamed: dict[str, str]
    ):
        self._files, self._parts, self._renamed = files, parts, renamed
        hidden = {name for name, *_ in parts.values()} | set(renamed.values())
        self.shapes: dict[str, tuple[int, ...]] = {
            name: shape for name, shape in files.shapes.items() if name not in hidden
        }
        self.shapes |= {name: files.shapes[source] for name, source in renamed.items()}
        for name, (source, _, _, rows) in parts.items():
            self.shapes[name] = rows, files.shapes[source][2]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `TensorFiles.read`."""
        if name not in self._parts:
            return self._files.read(self._renamed.get(name, name), index)
        source, expert, first, _ = self._parts[name]
        rows, columns = index or (slice(None), slice(None))
        start, stop, _ = rows.indices(self.shapes[name][0])
        at = slice(expert, expert + 1), slice(first + start, first + stop), columns
        return self._files.read(source, at)[0]


def separate_experts(files: Any, config: DecoderConfig) -> Any:
    """The files with a tensor for every expert, whichever way they are stored.

    Args:
      files: of a model folder.
      config: of a family with experts.
    """
    family = FAMILIES[config.family]
    if not hasattr(family, "EXPERT"):  # its own tensors are stacked
        return files
    parts: dict[str, tuple[str, int, int, int]] = {}
    renamed: dict[str, str] = {}
    for name, shape in files.shapes.items():
        match = STACKED.fullmatch(name)
        if match is None or len(shape) != 3:
            continue
        layer, kind = match.groups()
        rows = shape[1] if kind == "down_proj" else shape[1] // 2
        matrices = ("down",) if kind == "down_proj" else ("gate", "up")
        for expert in range(shape[0]):
            for number, matrix in enumerate(matrices):
                own = family.EXPERT.format(expert=expert, matrix=family.MATRICES[matrix])
                parts[f"{layer}.{own}"] = name, expert, number * rows, rows
        ours, theirs = f"{layer}.{family.ROUTER}", f"{layer}.mlp.gate.weight"
        if ours != theirs and theirs in files.shapes:
            renamed[ours] = theirs
    return SeparateExperts(files, parts, renamed) if parts else files
