"""Reward calibration: gradients of chosen and rejected moved to the centre of a band."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DECAY = 0.98
"""Of the running averages: the authors' code."""
SMALLEST = 1e-12
"""Coefficients and norms below it have no logarithm: the authors' code."""
BAND_START = dict.fromkeys(("log_d_w", "log_d_l", "log_s_w", "log_s_l", "log_a", "band_steps"), 0.0)
"""Running statistics before the first step: averages of logarithms, log a, number of batches."""


def update_band(
    running: Mapping[str, Array],
    slopes: tuple[Float[Array, ""], Float[Array, ""]],
    norms: tuple[Float[Array, ""], Float[Array, ""]],
) -> dict[str, Float[Array, ""]]:
    r"""The running averages with a batch, and the factor that they make.

    .. math:: a = \sqrt{r^* / r}, \quad
              \log r = \overline{\log d_w} - \overline{\log d_l}, \quad
              \log r^* = \overline{\log \|s_l\|} - \overline{\log \|s_w\|}

    The averages are exponential, with a decay of 0.98, and begin with the first batch. A batch
    whose coefficients or norms are not all positive (a loss past its target, hinges at rest) leaves
    them as they are; the authors' code counts 1e-12 for such a value.

    Args:
      running: of `BAND_START`.
      slopes: means of d_w and d_l over the batch.
      norms: of s_w and s_l, the gradients of the batch's mean log-prob of chosen and of rejected.

    Returns:
      Running statistics, by name; `log_a` is that of this batch, and 0 before any batch counted.

    References:
      arXiv:2604.18239, reward calibration; `scripts/dpo_trainer.py` of the authors.
    """
    values = jnp.stack([*slopes, *norms])
    counts = jnp.all(jnp.isfinite(values) & (values > SMALLEST))
    now = dict(zip(BAND_START, jnp.log(jnp.where(counts, values, 1.0)), strict=False))
    steps = running["band_steps"]
    kept = jnp.where(steps > 0, DECAY, 0.0)
    after: dict[str, Array] = {}
    for name, value in now.items():
        mean = kept * running[name] + (1 - kept) * value
        after[name] = jnp.where(counts, mean, running[name])
    log_a = (after["log_s_l"] - after["log_s_w"] - after["log_d_w"] + after["log_d_l"]) / 2
    steps = steps + counts.astype(steps.dtype)
    after |= {"log_a": jnp.where(steps > 0, log_a, 0.0), "band_steps": steps}
    return jax.lax.stop_gradient(after)


def calibrated(
    log_probs: Float[Array, "pairs 2"], log_a: Float[Array, ""]
) -> Float[Array, "pairs 2"]:
    r"""Log-probs with the same values, whose gradients are multiplied by a and by 1 / a.

    .. math:: \tilde z_w = a z_w + (1 - a) \, \mathrm{sg}(z_w), \quad
              \tilde z_l = \tfrac{1}{a} z_l + \bigl(1 - \tfrac{1}{a}\bigr) \mathrm{sg}(z_l)

    Any loss of them has the coefficients a d_w and d_l / a.

    Args:
      log_probs: of chosen and rejected.
      log_a: log a, one for all pairs (`update_band`).

    References:
      arXiv:2604.18239, reward calibration.
    """
    fixed = jax.lax.stop_gradient(log_probs)
    factors = jnp.exp(jnp.stack([log_a, -log_a]))[None]
    return fixed + factors * (log_probs - fixed)
