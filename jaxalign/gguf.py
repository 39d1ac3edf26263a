"""GGUF files: the metadata and the tensors of a model that llama.cpp runs, in one file or several.

The library `gguf` knows the quantisations; the header is read here, because a vocabulary of 262,144
tokens takes the library's reader nine seconds, and it keeps the whole file mapped.
"""

import contextlib
import dataclasses
import errno
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxalign.errors import UserError

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
CHUNK = 2**20  # elements that are dequantised at a time
NO_MODEL = {
    "mmproj": "a projector of images or sound",
    "adapter": "an adapter",
    "imatrix": "an importance matrix",
}
TRUNCATED = "it is truncated or damaged, download it again"
FORMATS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Formats of matrices that are written -> the library's name of such a file."""
LARGEST = {"f32": 3.4028235e38, "f16": 65504.0, "bf16": 3.3895314e38, "q8_0": 127 * 65504.0}
"""The largest number of each format; a block of 32 in q8_0 has a float16 factor."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file and byte, ggml's type, and its shape with rows first."""

    file: Path
    start: int
    kind: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GGUF:
    """The header of a GGUF model: its file, its metadata and where its tensors are."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, by its suffix."""
    return Path(path).suffix.lower() == SUFFIX


def read_gguf(path: str | Path) -> GGUF:
    """The header of a language model's GGUF file; of a model in several files, any one's path.

    Raises:
      UserError: the file is missing, damaged, or holds something other than a language model.
    """
    file = Path(path).expanduser()
    opened = _read_part(file)
    count = int(opened.metadata.get("split.count", 0))
    if count > 1:
        opened = _join_parts(file, count)
    kind = opened.metadata.get("general.type")
    if opened.metadata.get("general.architecture") == "clip":
        kind = "mmproj"
    if kind in NO_MODEL:
        raise UserError(f"{file}: {NO_MODEL[kind]}; name the GGUF file of the language model")
    return opened


def _join_parts(file: Path, count: int) -> GGUF:
    """All parts of a split model; the first one's metadata are the model's."""
    match = PART.fullmatch(file.name)
    if match is None or int(match[3]) != count:
        raise UserError(
            f"{file}: one of {count} parts; name them NAME-00001-of-{count:05d}{SUFFIX} and so on"
        )
    numbers = (f"{number:05d}-of-{count:05d}" for number in range(1, count + 1))
    files = [file.with_name(f"{match[1]}-{number}{SUFFIX}") for number in numbers]
    missing = [part.name for part in files if not part.is_file()]
    if missing:
        raise UserError(f"{file}: one of {count} parts, but {', '.join(missing)} is not beside it")
    parts = [_read_part(part) for part in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return GGUF(file, parts[0].metadata, tensors)


def _read_part(file: Path) -> GGUF:
    from_library = _library()
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            return _Header(file, stream, size).read(from_library.GGML_QUANT_SIZES)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file needs: pip install 'jaxalign[gguf]'") from None
    return gguf


class _Header:
    """One file's header, read from its beginning."""

    def __init__(self, file: Path, stream: BinaryIO, size: int):
        self.file, self.stream, self.size = file, stream, size

    def read(self, sizes: Any) -> GGUF:
        """Everything up to the tensors' data, which must lie within the file."""
        if self.size < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise UserError(f"{self.file}: not a GGUF file")
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise UserError(f"{self.file}: big-endian GGUF is not supported; convert it again")
        if version not in VERSIONS:
            raise UserError(f"{self.file}: GGUF version {version} is not supported, 2 and 3 are")
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(fields):
            name = self._string()
            metadata[name] = self._value(self._scalar("I"))
        infos = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{self.file}: general.alignment: {alignment!r}: {TRUNCATED}")
        data = -(-self.stream.tell() // alignment) * alignment
        stored = {}
        for name, shape, kind, offset in infos:
            if kind not in sizes:
                raise UserError(
                    f"{self.file}: {name}: quantisation type {kind} is unknown to the installed "
                    "library gguf; upgrade it or use another quantisation"
                )
            stored[name] = StoredTensor(self.file, data + offset, kind, shape)
            block, size = sizes[kind]
            count = math.prod(shape)
            if count == 0 or shape[-1] % block or data + offset + count // block * size > self.size:
                raise UserError(f"{self.file}: ends before {name} does: {TRUNCATED}")
        return GGUF(self.file, metadata, stored)

    def _take(self, count: int) -> bytes:
        left = self.size - self.stream.tell()
        if count > left:
            raise UserError(f"{self.file}: ends within its header: {TRUNCATED}")
        return self.stream.read(count)

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise UserError(f"{self.file}: metadata of unknown type {kind}: {TRUNCATED}")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in SCALARS:
            code = SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))
        return [self._value(inner) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1] or (1,)
        return name, shape, self._scalar("I"), self._scalar("Q")


def read_tensor(tensor: StoredTensor, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A vector or matrix, or the part that `index` names, dequantised a few rows at a time.

    Args:
      tensor: where it lies.
      index: one slice of step 1 per axis; none: all of it.

    Returns:
      Its numbers, as they are stored or in float32 where they are quantised.

    Raises:
      UserError: the library does not dequantise this type.
    """
    library = _library()
    block, size = library.GGML_QUANT_SIZES[tensor.kind]
    rows, width = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    bounds = [s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=False)]
    bounds = bounds or [(0, n) for n in tensor.shape]
    first, last = bounds[-1]
    top, bottom = bounds[0] if len(tensor.shape) > 1 else (0, 1)
    blocks = slice(first // block * size, -(-last // block) * size)
    raw = np.memmap(
        tensor.file, np.uint8, "r", offset=tensor.start, shape=(rows, width // block * size)
    )
    decode = _decoder(library, tensor)
    out = np.empty((bottom - top, last - first), decode(raw[:1, :size].copy()).dtype)
    step = max(1, CHUNK // width)
    for start in range(top, bottom, step):
        stop = min(start + step, bottom)
        part = decode(np.ascontiguousarray(raw[start:stop, blocks]))
        skipped = first % block
        out[start - top : stop - top] = part[:, skipped : skipped + last - first]
    return out if len(tensor.shape) > 1 else out[0]


def _decoder(library: Any, tensor: StoredTensor) -> Callable[[np.ndarray], np.ndarray]:
    """Bytes of some rows -> their numbers."""
    import ml_dtypes

    kind = library.GGMLQuantizationType(tensor.kind)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": ml_dtypes.bfloat16}
    if kind.name in plain:
        return lambda raw: raw.view(plain[kind.name])

    def dequantise(raw: np.ndarray) -> np.ndarray:
        try:
            return library.quants.dequantize(raw, kind)
        except NotImplementedError:
            raise UserError(
                f"{tensor.file}: quantisation {kind.name} cannot be undone by the installed "
                "library gguf; use another quantisation of this model"
            ) from None

    return dequantise


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to write: its name, shape (rows first) and format, and a call for its numbers."""

    name: str
    shape: tuple[int, ...]
    format: str
    values: Callable[[], np.ndarray]


def write_gguf(
    file: Path, architecture: str, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]
) -> None:
    """Writes a GGUF file; one tensor is held at a time.

    Args:
      file: to write; an existing one is overwritten.
      architecture: llama.cpp's name of it.
      metadata: more keys and values. Numbers are written as uint32 (int32 if negative) and float32,
        empty lists are left out.
      tensors: in the order of the file.

    Raises:
      UserError: a tensor holds a number that its format cannot.
    """
    library = _library()
    types = library.GGUFValueType
    with contextlib.closing(library.GGUFWriter(file, architecture)) as writer:
        for key, value in metadata.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if value != []:
                kind = types.UINT32 if whole else types.get_type(value)
                writer.add_key_value(key, value, kind)
        for tensor in tensors:
            kind = library.GGMLQuantizationType[tensor.format.upper()]
            block, size = library.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(tensor.shape) // block * size
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            encoded = _encoded(library, tensor)
            try:
                writer.write_tensor_data(encoded)
            except OSError as error:  # NumPy's, of a full disk, has no number
                number = error.errno or errno.ENOSPC
                raise OSError(number, os.strerror(number)) from error


def _encoded(library: Any, tensor: NewTensor) -> np.ndarray:
    """The numbers of a tensor in its format."""
    x = np.ascontiguousarray(tensor.values(), np.float32)
    largest = np.abs(x).max(initial=0)
    if not np.isfinite(largest):
        raise UserError(f"{tensor.name}: holds NaN or infinity; the training of it diverged")
    if largest > LARGEST[tensor.format]:
        raise UserError(
            f"{tensor.name}: {largest:g} is too large for {tensor.format}; set --dtype bf16 or f32"
        )
    return library.quants.quantize(x, library.GGMLQuantizationType[tensor.format.upper()])
