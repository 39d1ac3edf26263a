r"""Packed weights of gpt-oss, read as the matrices that they stand for.

In MXFP4, 32 numbers of 4 bits share a factor of 8 bits, a power of two (Open Compute Project,
Microscaling Formats, version 1.0). A tensor NAME [experts, inputs, outputs] is stored transposed,
as NAME_blocks [experts, outputs, blocks, 16], two numbers in a byte, the lower bits first, and
NAME_scales [experts, outputs, blocks]:

.. math:: w = 2^{s - 127} \, v, \qquad
          v \in \pm \{0, \tfrac12, 1, \tfrac32, 2, 3, 4, 6\}

All of these are bfloat16 numbers; nothing is rounded.
"""

import ml_dtypes
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.tensor_files import PACKED, TensorFiles

BLOCK = 32
"""Numbers that share a factor."""
NOT_A_NUMBER = 255
"""The scale that stands for NaN."""
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
PAIRS = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=-1)
"""Both numbers of every byte."""
FACTORS = np.ldexp(np.float32(1), np.arange(NOT_A_NUMBER) - 127)


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers of some blocks.

    Args:
      blocks: bytes, [..., blocks, 16].
      scales: of the blocks, [..., blocks], below 255.

    Returns:
      [..., 32 blocks] in float32.
    """
    numbers = PAIRS[blocks].reshape(*scales.shape, BLOCK) * FACTORS[scales][..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


class UnpackedTensors:
    """Tensor files whose packed weights have the names and shapes of plain ones.

    Args:
      files: to read from.
    """

    def __init__(self, files: TensorFiles):
        self._files = files
        self.shapes = {name: x for name, x in files.shapes.items() if not PACKED.match(name)}
        for name, shape in files.shapes.items():
            plain = name.removesuffix("_blocks")
            if plain == name:
                continue
            scales = files.shapes.get(f"{plain}_scales")
            if len(shape) != 4 or shape[3] != BLOCK // 2 or scales != shape[:3]:
                raise UserError(
                    f"{files.files[name]}: {name}: {list(shape)} bytes and scales of "
                    f"{list(scales or ())} are not the blocks of 32 numbers of MXFP4"
                )
            self.shapes[plain] = shape[0], BLOCK * shape[2], shape[1]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `TensorFiles.read`; packed weights in bfloat16, one expert after the other."""
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        if blocks not in self._files.shapes:
            return self._files.read(name, index)
        index = index or (slice(None),) * 3
        bounds = [part.indices(size) for part, size in zip(index, self.shapes[name], strict=True)]
        experts, inputs, outputs = (range(*part) for part in bounds)
        needed = slice(inputs.start // BLOCK, -(-inputs.stop // BLOCK))
        within = slice(inputs.start % BLOCK, inputs.start % BLOCK + len(inputs))
        out = np.empty((len(experts), len(inputs), len(outputs)), ml_dtypes.bfloat16)
        for number, expert in enumerate(experts):
            at = slice(expert, expert + 1), slice(*bounds[2]), needed
            factors = self._files.read(scales, at)
            if (factors == NOT_A_NUMBER).any():
                raise UserError(
                    f"{self._files.files[scales]}: {scales}: holds NaN; the file is damaged"
                )
            numbers = unpacked(self._files.read(blocks, (*at, slice(None))), factors)
            out[number] = numbers[0, :, within].T
        return out


def holds_packed(files: TensorFiles) -> bool:
    """Whether some of the weights are packed."""
    return any(name.endswith("_blocks") for name in files.shapes)
