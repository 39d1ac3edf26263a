r"""Frozen matrices in 8 or 4 bits, under adapters that are trained (QLoRA).

The inputs of each output are cut into blocks. A block has a scale s, and each of its weights a code
c of the value v(c):

.. math:: W = s \, v(c), \quad |v(c)| \le v_{max}, \quad s = \max |W| / v_{max}

=====  ================================================  ================  ===============
kind   values                                            bits of a code    largest error
=====  ================================================  ================  ===============
int8   whole numbers from -127 to 127                    8                 s / 2
nf4    the 16 of `NF4`, from -1 to 1                     4                 0.152 s
=====  ================================================  ================  ===============

A float32 scale for 64 weights is half a bit for each. Reference: QLoRA, arXiv:2305.14314, section 3
and appendix E; its double quantisation of the scales is not done.

Every weight is coded and decoded by itself, so that a matrix keeps its sharding. Google's library
qwix gives the same codes of NF4 (`tests/models/test_quantised.py` compares them), but looks up
their values in a flattened matrix, for which each device of a mesh gathers a byte for every weight,
and takes 12 times as long to quantise (qwix 0.1.8, jax 0.10.2, CPU).
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxalign.errors import UserError
from jaxalign.records import AnyArray, record, static

Kind = Literal["int8", "nf4"]
BLOCK = 64
"""Largest number of weights with one scale; QLoRA's."""
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of 4-bit NormalFloat: quantiles of a normal distribution (QLoRA, appendix E)."""
_LARGEST = {"int8": 127.0, "nf4": 1.0}


@record
class QuantisedMatrix:
    """A matrix, or a stack of matrices [layers, inputs, outputs], as codes and scales.

    Attributes:
      codes: int8 [inputs, outputs]; of nf4 uint8 [inputs / 2, outputs], an even input's code in the
        lower half of a byte and the next one's in the upper half.
      scale: of every block of inputs.
      kind: of the values.
    """

    codes: Integer[AnyArray, "*layers rows outputs"]
    scale: Float[AnyArray, "*layers blocks outputs"]
    kind: Kind = static("nf4")


def block_size(inputs: int) -> int:
    """Weights with one scale: the largest divisor of the inputs up to `BLOCK`."""
    return max(size for size in range(1, min(BLOCK, inputs) + 1) if inputs % size == 0)


@functools.partial(jax.jit, static_argnums=1)
def quantise(kernels: Float[Array, "layers inputs outputs"], kind: Kind) -> QuantisedMatrix:
    """The nearest values to a stack of matrices, one matrix at a time.

    Args:
      kernels: in any float dtype.
      kind: of the values.

    Raises:
      UserError: nf4 of an odd number of inputs.
    """
    if kind == "nf4" and kernels.shape[1] % 2:
        raise UserError(
            f"lora.weights: nf4 stores inputs in pairs, and a matrix has {kernels.shape[1]}; set "
            "int8 or bfloat16"
        )
    return jax.lax.map(functools.partial(_quantised, kind=kind), kernels)


def _quantised(kernel: Array, kind: Kind) -> QuantisedMatrix:
    inputs, outputs = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(-1, block_size(inputs), outputs)
    scale = jnp.max(jnp.abs(blocks), axis=1) / _LARGEST[kind]
    scale = jnp.where(scale > 0, scale, 1.0)
    values = (blocks / scale[:, None]).reshape(inputs, outputs)
    if kind == "int8":
        return QuantisedMatrix(codes=jnp.round(values).astype(jnp.int8), scale=scale, kind=kind)
    codes = jnp.zeros(values.shape, jnp.uint8)  # the number of borders below a value
    for low, high in itertools.pairwise(NF4):
        codes = codes + (values > (low + high) / 2).astype(jnp.uint8)
    return QuantisedMatrix(codes=codes[0::2] | (codes[1::2] << 4), scale=scale, kind=kind)


def dequantise(
    matrix: QuantisedMatrix, dtype: Any = jnp.float32
) -> Float[Array, "*layers inputs outputs"]:
    """The matrix of the codes' values times their scales, computed in float32.

    Args:
      matrix: one or a stack.
      dtype: of the result.
    """
    codes, scale = matrix.codes, matrix.scale
    *lead, rows, outputs = codes.shape
    if matrix.kind == "nf4":
        rows = 2 * rows
        codes = jnp.stack([codes & 15, codes >> 4], axis=-2).reshape(*lead, rows, outputs)
        table = jnp.asarray(NF4, jnp.float32)
        values = table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    else:
        values = codes.astype(jnp.float32)
    blocks = values.reshape(*lead, scale.shape[-2], -1, outputs) * scale[..., None, :]
    return blocks.reshape(*lead, rows, outputs).astype(dtype)


def in_fewer_bits(
    params: Mapping[str, Any], weights: Literal["bfloat16", "int8", "nf4"], dtype: Any
) -> dict[str, Any]:
    """A decoder's parameters as a step reads them that trains adapters alone.

    Args:
      params: of a decoder without experts, or their shapes.
      weights: how the stacked matrices of the layers are stored.
      dtype: of embeddings and head, unless all are bfloat16: that of the computation, to which they
        are converted at every use; None: their own.

    Returns:
      The same tree; norms and biases as they are.
    """
    rest = jnp.bfloat16 if weights == "bfloat16" else dtype

    def stored(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [getattr(entry, "key", None) for entry in path]
        if names[-1] == "kernel" and "layers" in names and weights != "bfloat16":
            change: Any = functools.partial(quantise, kind=weights)
        elif names[-1] in ("kernel", "embedding") and rest is not None:
            change = functools.partial(jax.lax.convert_element_type, new_dtype=rest)
        else:
            return leaf
        return jax.eval_shape(change, leaf) if _is_shape(leaf) else change(leaf)

    return jax.tree_util.tree_map_with_path(stored, dict(params))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
