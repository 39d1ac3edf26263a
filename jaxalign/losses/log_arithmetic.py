"""Logarithms of probabilities' complements and odds, finite in value and slope."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def log1mexp(x: Float[Array, " *axes"]) -> Float[Array, " *axes"]:
    r"""Logarithm of one minus a probability given as a logarithm.

    .. math:: \log(1 - e^x), \quad x < 0

    Each branch is exact on its own side of -log 2, and gets a harmless value on the other, so that
    neither the value nor the derivative of the unused branch can be infinite (Maechler, 2012,
    "Accurately computing log(1 - exp(-|a|))"; the double `where` is the JAX FAQ's).
    """
    near_zero = x > -math.log(2)
    near = jnp.where(near_zero, x, -0.5)
    far = jnp.where(near_zero, -1.0, x)
    return jnp.where(near_zero, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(far)))


def log_odds(x: Float[Array, " *axes"]) -> Float[Array, " *axes"]:
    r"""Log-odds of a probability given as a logarithm.

    .. math:: x - \log(1 - e^x), \quad x \le 0

    A probability closer to one than the dtype resolves counts as one epsilon away from it: its
    odds are then large but finite, and flat.
    """
    x = jnp.minimum(x, -float(jnp.finfo(x.dtype).eps))
    return x - log1mexp(x)
