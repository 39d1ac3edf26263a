"""How alike two responses are to the model: CHES and what it was compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rapidfuzz.distance import Levenshtein

from jaxalign.data.batches import PairBatch
from jaxalign.models.responses import response_states
from jaxalign.records import AnyArray

Hidden = Float[Array, "pairs 2 response width"]
Lengths = Int[AnyArray, "pairs 2"]


def hidden_states_of_pairs(params: Mapping[str, Any], config: Any, batch: PairBatch) -> Hidden:
    """The last layer's states that predict each response token, 0 at padding."""
    rows = map(jnp.asarray, batch.rows()[:3])
    hidden = response_states(params, config, *rows).astype(jnp.float32)
    hidden = hidden.reshape(*batch.response_tokens.shape, -1)
    real = jnp.arange(hidden.shape[2])[None, None] < jnp.asarray(batch.response_length)[..., None]
    return jnp.where(real[..., None], hidden, 0.0)


def ches(hidden: Hidden, lengths: Lengths) -> Float[Array, " pairs"]:
    r"""Centred hidden embedding similarity of chosen and rejected.

    .. math:: \Bigl\langle \sum_k h^w_k, \sum_k h^l_k \Bigr\rangle
              - \Bigl\| \sum_k h^w_k \Bigr\|^2

    The more, the more the chosen response is expected to lose. The states are those that predict
    the response's tokens: from the last one of the prompt on.

    Args:
      hidden: as `hidden_states_of_pairs` makes them.
      lengths: of the responses; not used.

    References:
      Razin et al., 2024, arXiv:2410.08847, definition 2.
    """
    del lengths
    chosen, rejected = _sides(hidden)
    return jnp.sum(chosen * rejected, axis=-1) - jnp.sum(jnp.square(chosen), axis=-1)


def ln_ches(hidden: Hidden, lengths: Lengths) -> Float[Array, " pairs"]:
    r"""CHES of mean instead of summed states: the length-normalised form.

    .. math:: \frac{\langle \sum_k h^w_k, \sum_k h^l_k \rangle}{|y_w| |y_l|}
              - \frac{\| \sum_k h^w_k \|^2}{|y_w|^2}

    Args:
      hidden: as `hidden_states_of_pairs` makes them.
      lengths: of the responses.

    References:
      Razin et al., 2024, arXiv:2410.08847, section 5.
    """
    means = jnp.stack(_sides(hidden), axis=1) / jnp.asarray(lengths, jnp.float32)[..., None]
    return jnp.sum(means[:, 0] * means[:, 1], axis=-1) - jnp.sum(jnp.square(means[:, 0]), axis=-1)


def last_hidden_similarity(hidden: Hidden, lengths: Lengths) -> Float[Array, " pairs"]:
    """Inner product of the states that predict the responses' last tokens (a baseline there)."""
    last = (jnp.asarray(lengths) - 1)[..., None, None]
    chosen, rejected = _sides(jnp.take_along_axis(hidden, last, axis=2))
    return jnp.sum(chosen * rejected, axis=-1)


def _sides(hidden: Hidden) -> tuple[Array, Array]:
    """Sums over the tokens of chosen and of rejected."""
    return hidden[:, 0].sum(axis=1), hidden[:, 1].sum(axis=1)


HIDDEN_SIMILARITIES: dict[str, Callable[[Any, Any], Array]] = {
    "ches": ches,
    "ln_ches": ln_ches,
    "last_hidden": last_hidden_similarity,
}
"""Those that need a model."""


def edit_similarity(chosen: Int[np.ndarray, " n"], rejected: Int[np.ndarray, " m"]) -> float:
    """Minus the edit distance of two token sequences over the longer one's length (a baseline).

    0 for equal sequences, -1 where no token is shared in place. Insertions, deletions and
    replacements cost 1.
    """
    return -Levenshtein.normalized_distance(chosen.tolist(), rejected.tolist())
