"""Rotary positions: the wavelengths of every scaling variant, and the rotation itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.models.config import Rope


def rope_frequencies(
    rope: Rope, head_width: int, context_length: int, length: int | Int[Array, ""]
) -> tuple[Float[Array, " frequencies"], float]:
    r"""Angular frequency of each rotated pair, and the factor on cosines and sines.

    .. math:: \omega_i = \theta^{-2i/d}, \quad i = 0 \ldots d/2 - 1, \quad d = \text{rotated width}

    then scaled as the variant says. "dynamic" and "longrope" depend on the longest sequence of
    the batch, as in transformers.

    Args:
      rope: base, variant and its constants.
      head_width: width of one head.
      context_length: the model's declared context, in tokens.
      length: the largest position in the batch plus one.

    Returns:
      Frequencies in radians per token, float32, and the attention factor.

    References:
      Su et al., arXiv:2104.09864; yarn: Peng et al., arXiv:2309.00071, section 3; longrope: Ding
      et al., arXiv:2402.13753; llama3: the Llama 3.1 model card's reference code.
    """
    width = int(head_width * rope.rotated)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = 1.0 / np.float32(rope.theta) ** exponents
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.kind == "dynamic":
        assert rope.factor is not None
        longest = jnp.maximum(jnp.asarray(length, jnp.float32), context_length)
        stretch = rope.factor * longest / context_length - (rope.factor - 1)
        base = rope.theta * stretch ** (width / (width - 2))
        return 1.0 / jnp.power(base, jnp.asarray(exponents)), 1.0
    elif rope.kind == "llama3":
        frequencies = llama3_frequencies(rope, frequencies)
    elif rope.kind == "yarn":
        return _yarn(rope, width, context_length)
    elif rope.kind == "longrope":
        return _longrope(rope, frequencies, context_length, length)
    return jnp.asarray(frequencies, jnp.float32), 1.0


def llama3_frequencies(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between are blended."""
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    context = rope.original_context
    assert factor is not None
    assert context is not None
    assert low is not None
    assert high is not None
    wavelengths = 2 * math.pi / frequencies
    share = (context / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / factor + share * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, blended)
    return np.where(wavelengths < context / high, frequencies, scaled)


def _yarn(rope: Rope, width: int, context_length: int) -> tuple[jax.Array, float]:
    """NTK by parts: a ramp over the dimensions between stretched and kept frequencies."""
    context = rope.original_context
    assert context is not None
    factor = context_length / context if rope.factor is None else rope.factor

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = magnitude(1.0)
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)

    def dimension(rotations: float) -> float:
        wavelength = context / (rotations * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(width // 2, dtype=np.float32) - low) / (high - low or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    periods = np.float32(rope.theta) ** (np.arange(0, width, 2, dtype=np.float32) / width)
    frequencies = (1 - kept) / (factor * periods) + kept / periods
    return jnp.asarray(frequencies, jnp.float32), attention_factor


def _longrope(
    rope: Rope, frequencies: np.ndarray, context_length: int, length: int | Int[Array, ""]
) -> tuple[jax.Array, float]:
    """One learned factor per dimension, in a short and a long set, by the batch's length."""
    context = rope.original_context
    assert context is not None
    factor = context_length / context if rope.factor is None else rope.factor
    attention_factor = rope.attention_factor
    if attention_factor is None:
        grown = factor > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(context)) if grown else 1.0
    short = jnp.asarray(frequencies / np.asarray(rope.short_factor, np.float32))
    long = jnp.asarray(frequencies / np.asarray(rope.long_factor, np.float32))
    return jnp.where(jnp.asarray(length) > context, long, short), attention_factor


def rope_angles(
    rope: Rope, head_width: int, context_length: int, positions: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length frequencies"], Float[Array, "batch length frequencies"]]:
    """Cosines and sines of every position's rotation, float32."""
    length = jnp.max(positions) + 1
    frequencies, factor = rope_frequencies(rope, head_width, context_length, length)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "batch length heads head_width"],
    cosines: Float[Array, "rows length frequencies"],
    sines: Float[Array, "rows length frequencies"],
    *,
    interleaved: bool = False,
) -> Float[Array, "batch length heads head_width"]:
    """Turns pairs of each head's first d entries; the rest passes through.

    The pairs are (i, i + d/2), or (2i, 2i + 1) where they are interleaved.
    """
    half = cosines.shape[-1]
    cosines, sines = cosines[:, :, None, :], sines[:, :, None, :]
    parts = slice(0, half), slice(half, 2 * half)
    if interleaved:
        parts = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    first, second = (x[..., part].astype(jnp.float32) for part in parts)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    turned = [part.astype(x.dtype) for part in turned]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * half)]
    return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
