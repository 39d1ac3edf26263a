"""Safetensors files read one tensor at a time."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError

# Buffers that old checkpoints carry and no model needs.
HARMLESS = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|attention\.bias"
    r"|attention\.masked_bias)$"
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
FLOATING = ("F64", "F32", "F16", "BF16")
PACKED = re.compile(r"(.*)_(blocks|scales)$")
"""Names of the bytes of packed weights (`mxfp4`)."""


class TensorFiles:
    """The tensors of safetensors files, read one at a time.

    A file is opened for each read and closed after it: the pages of an open memory map count as
    the process's own memory, as much as the whole model.

    Args:
      files: to read from.
      weight_map: tensor -> name of the file that holds it, from an index; copies in other files and
        tensors that are not listed are ignored. None: every tensor is read.

    Raises:
      UserError: if a file cannot be read, or a tensor is not of floating-point numbers.
    """

    def __init__(self, files: Iterable[Path], weight_map: Mapping[str, str] | None = None):
        from safetensors import SafetensorError

        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with self._open(file) as opened:
                    for name in opened.keys():  # noqa: SIM118, it is no dict
                        if weight_map is not None and weight_map.get(name) != file.name:
                            continue
                        part = opened.get_slice(name)
                        kind = part.get_dtype()
                        packed = kind == "U8" and PACKED.match(name)
                        if kind not in FLOATING and not packed and not HARMLESS.search(name):
                            raise UserError(
                                f"{file}: {name}: {kind} weights are not supported; save the "
                                "model in float32, float16 or bfloat16"
                            )
                        self.files[name] = file
                        self.shapes[name] = tuple(part.get_shape())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None

    def _open(self, file: Path) -> Any:
        from safetensors import safe_open

        return safe_open(file, framework="numpy")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or the part of it that `index` names, without reading the rest.

        Bytes of packed weights are returned as they are.

        Raises:
          UserError: if a value in it is not finite.
        """
        with self._open(self.files[name]) as opened:
            if index:
                whole = tuple(slice(part.start, part.stop) for part in index)
                strides = tuple(slice(None, None, part.step) for part in index)
                tensor = opened.get_slice(name)[whole][strides]
            else:
                tensor = opened.get_tensor(name)
        if tensor.dtype != np.uint8 and not _is_finite(tensor):
            raise UserError(
                f"{self.files[name]}: {name}: holds NaN or infinity; the file is damaged or the "
                "training that wrote it diverged"
            )
        return tensor


def _is_finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, tested by its bits: half the time of copying `x`."""
    infinity, size = np.array(np.inf, x.dtype), x.dtype.itemsize
    return all(
        x.view(kind).max(initial=0) < bound.view(kind)
        for kind, bound in ((f"i{size}", infinity), (f"u{size}", -infinity))
    )


def tensor_files(folder: Path) -> TensorFiles:
    """The tensors of a model folder: of its single file, or those listed by its index.

    Raises:
      UserError: if there are none, or the index does not match the files.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return TensorFiles([single])
    if index.is_file():
        listed = _weight_map(index)
        files = TensorFiles([folder / name for name in sorted(set(listed.values()))], listed)
        for name, file in listed.items():
            if name not in files.shapes:
                raise UserError(f"{index}: {name}: is not in {file}, where the index has it")
        return files
    pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if pickles:
        raise UserError(
            f"{folder}: only {pickles[0]} there; pickled weights can run code and are refused, "
            "convert them to model.safetensors"
        )
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of the file in the index's folder that holds it."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: broken index ({type(error).__name__}: {error})") from None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: weight_map: an object of tensor and file names is expected")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {name}: {file!r} is not the name of a file in the folder")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: {name}: names {file}, which is not in the folder")
    return listed
