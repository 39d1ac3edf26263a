"""Matrix products in the form that the device computes fastest, chosen while a program is traced.

On accelerators and in float32 they are plain products. In bfloat16 on a CPU:

- jaxlib reaches the processor's bfloat16 units (AVX-512 BF16, AMX) only by products of two bfloat16
  operands with a float32 result, whose left operand is contracted over its last axis and lies in
  memory row by row. So :math:`y = x W` and :math:`dx = dy W^T` have float32 results, which are
  rounded to bfloat16, and :math:`x^T` in :math:`dW = x^T dy` is written to memory first.
- Without such units both operands are converted to float32.

In both forms the gradients of W are summed and returned in float32. A quantised W is dequantised in
each product, and again for the gradient of x, the only one. `python -m benchmarks.step_parts`
measures these forms; `tests/models/test_products.py` finds them in the compiled program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jaxalign.models import devices
from jaxalign.models.differentiation import with_reverse_rule
from jaxalign.models.precision import multiply, precision
from jaxalign.models.quantised import QuantisedMatrix, dequantise

SAVED = "product"
"""Name of the results that rematerialisation saves where it saves matrix products."""


def named(x: Array, name: str) -> Array:
    """The array, under a name that policies of rematerialisation refer to.

    bfloat16 on a CPU is kept as integers: XLA converts a whole stack of bfloat16 layers to float32
    and back when it writes one of them.
    """
    return _as_integers(name, x) if _on_cpu(x.dtype) else checkpoint_name(x, name)


def _same(name: str, x: Array) -> Array:
    return x


def _keep(name: str, x: Array) -> tuple[Array, None]:
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype), None


_as_integers = with_reverse_rule(_same, _keep, lambda name, _, dx: (dx,), (0,))


def product(
    x: Float[Array, "tokens inputs"], kernel: Float[Array, "inputs outputs"] | QuantisedMatrix
) -> Float[Array, "tokens outputs"]:
    """The product x W, computed in the dtype of `x`.

    Args:
      x: one row per token, so that the kernel's gradient is a product of two matrices, too.
      kernel: in any float dtype, or quantised, and then without a gradient.
    """
    on_cpu = _on_cpu(x.dtype)
    if isinstance(kernel, QuantisedMatrix):
        y = _quantised_product(x, kernel)
    elif on_cpu:
        y = _bfloat16_product(x, kernel)
    else:
        return multiply(x, kernel.astype(x.dtype))
    return named(y, SAVED) if on_cpu else y


def transposed_product(
    dy: Float[Array, "tokens outputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "tokens inputs"]:
    """The product dy W^T, the gradient of `product`'s x, computed in the dtype of `dy`."""
    if _on_cpu(dy.dtype):
        return input_gradient(dy, kernel.astype(dy.dtype)).astype(dy.dtype)
    return jnp.matmul(dy, kernel.T.astype(dy.dtype), precision=precision(dy.dtype))


def in_float32(
    x: Float[Array, "rows inner"], kernel: Float[Array, "inner outputs"]
) -> Float[Array, "rows outputs"]:
    """The product x W of two matrices of one dtype, summed and returned in float32."""
    return _contract(x, kernel, 0)


def input_gradient(
    dy: Float[Array, "tokens outputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "tokens inputs"]:
    """The gradient of x in x W, summed and returned in float32.

    Args:
      dy: cotangents of the product.
      kernel: in the dtype of `dy`.
    """
    return _contract(dy, kernel, 1)


def kernel_gradient(
    x: Float[Array, "tokens inputs"], dy: Float[Array, "tokens outputs"]
) -> Float[Array, "inputs outputs"]:
    """The gradient of W in x W, summed over the tokens and returned in float32.

    Args:
      x: what was multiplied with the kernel.
      dy: cotangents of the product, in the dtype of `x`.
    """
    if not (_on_cpu(x.dtype) and devices.has_bfloat16_units()):
        return _contract(x.T, dy, 0)
    # Row by row in memory: a copy of x, and a result that is not computed as its transpose.
    return _by_rows(_contract(_by_rows(x.T), dy, 0))


def _contract(x: Array, y: Array, axis: int) -> Array:
    """Float32 products of the rows of `x` with `y`, which is contracted over `axis`."""
    single = False
    if _on_cpu(x.dtype):
        if devices.has_bfloat16_units():
            single = len(x) == 1  # which jaxlib would compute as a vector, in float32
            x = jnp.pad(x, ((0, 1), (0, 0))) if single else x
        else:
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    # One operation: where y is transposed first, jaxlib converts both operands to float32.
    result = jax.lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return result[:1] if single else result


def _by_rows(x: Array) -> Array:
    return with_layout_constraint(x, Layout((0, 1)))


def _on_cpu(dtype: Any) -> bool:
    return dtype == jnp.bfloat16 and devices.is_single_cpu()


def _rounded(x: Array, kernel: Array) -> Array:
    return in_float32(x, kernel.astype(x.dtype)).astype(x.dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(x, kernel), (jax.lax.bitcast_convert_type(x, jnp.uint16), kernel)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    bits, kernel = saved
    x = jax.lax.bitcast_convert_type(bits, dy.dtype)
    return transposed_product(dy, kernel), kernel_gradient(x, dy).astype(kernel.dtype)


_bfloat16_product = with_reverse_rule(_rounded, _forward, _backward)


def _dequantised(x: Array, matrix: QuantisedMatrix) -> Array:
    kernel = dequantise(matrix, x.dtype)
    return _rounded(x, kernel) if _on_cpu(x.dtype) else multiply(x, kernel)


def _dequantised_forward(x: Array, matrix: QuantisedMatrix) -> tuple[Array, QuantisedMatrix]:
    return _dequantised(x, matrix), matrix


def _dequantised_backward(matrix: QuantisedMatrix, dy: Array) -> tuple[Array, None]:
    return transposed_product(dy, dequantise(matrix, dy.dtype)), None


_quantised_product = with_reverse_rule(_dequantised, _dequantised_forward, _dequantised_backward)
