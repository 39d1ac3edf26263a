"""What float32 means in the models' matrix products."""

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Float32 means float32: no TF32 on GPUs, no bfloat16 passes on TPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
