"""How the models' matrix products are computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models import devices


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Float32 means float32: no TF32 on GPUs, no bfloat16 passes on TPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def multiply(
    x: Float[Array, "*rows inputs"], kernel: Float[Array, "inputs outputs"], out_dtype: Any = None
) -> Float[Array, "*rows outputs"]:
    """A matrix product in the dtype of its inputs.

    XLA's CPU compiler has bfloat16 products of two or more rows; for a single one it would convert
    the whole matrix to float32 at every call.

    Args:
      x: rows.
      kernel: of the same dtype.
      out_dtype: of the result; None: that of the inputs.
    """
    single = x.shape[:-1] == (1,) and x.dtype == jnp.bfloat16 and devices.platform() == "cpu"
    padded = jnp.pad(x, ((0, 1), (0, 0))) if single else x
    y = jnp.matmul(padded, kernel, precision=precision(x.dtype), preferred_element_type=out_dtype)
    return y[:1] if single else y
