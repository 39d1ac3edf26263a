"""Similarities of two responses: CHES and its baselines."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rapidfuzz.distance import Levenshtein

from jaxalign.data.batches import PairBatch
from jaxalign.data.written import prompt_fields
from jaxalign.entanglement.pairs import ModelAndPairs
from jaxalign.files import write_json_lines
from jaxalign.models.responses import response_states
from jaxalign.progress import track
from jaxalign.records import AnyArray

Hidden = Float[Array, "pairs 2 response width"]
Lengths = Int[AnyArray, "pairs 2"]


def hidden_states_of_pairs(params: Mapping[str, Any], config: Any, batch: PairBatch) -> Hidden:
    """The last layer's states that predict each response token, 0 at padding."""
    rows = jax.tree.map(jnp.asarray, batch.rows())
    hidden = response_states(params, config, rows).astype(jnp.float32)
    hidden = hidden.reshape(*batch.response_tokens.shape, -1)
    real = jnp.arange(hidden.shape[2])[None, None] < jnp.asarray(batch.response_length)[..., None]
    return jnp.where(real[..., None], hidden, 0.0)


def ches(hidden: Hidden, lengths: Lengths) -> Float[Array, " pairs"]:
    r"""Centred hidden embedding similarity of chosen and rejected.

    .. math:: \Bigl\langle \sum_k h^w_k, \sum_k h^l_k \Bigr\rangle
              - \Bigl\| \sum_k h^w_k \Bigr\|^2

    The higher the score, the more the chosen log-prob is expected to fall. The states are those
    that predict the response's tokens, beginning with the prompt's last one.

    Args:
      hidden: from `hidden_states_of_pairs`.
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
      hidden: from `hidden_states_of_pairs`.
      lengths: of the responses.

    References:
      Razin et al., 2024, arXiv:2410.08847, section 5.
    """
    means = jnp.stack(_sides(hidden), axis=1) / jnp.asarray(lengths, jnp.float32)[..., None]
    return jnp.sum(means[:, 0] * means[:, 1], axis=-1) - jnp.sum(jnp.square(means[:, 0]), axis=-1)


def last_hidden_similarity(hidden: Hidden, lengths: Lengths) -> Float[Array, " pairs"]:
    """Inner product of the states that predict the responses' last tokens (a baseline)."""
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
"""Similarities that need a model."""


def edit_similarity(chosen: Int[np.ndarray, " n"], rejected: Int[np.ndarray, " m"]) -> float:
    """Minus the edit distance of two token sequences over the longer one's length (a baseline).

    0 for equal sequences; -1 if no token can be kept. Insertions, deletions and replacements
    cost 1.
    """
    return -Levenshtein.normalized_distance(chosen.tolist(), rejected.tolist())


SIMILARITIES = (*HIDDEN_SIMILARITIES, "edit")
"""Names of all similarities."""


def similarities(loaded: ModelAndPairs) -> dict[str, np.ndarray]:
    """Every similarity of every pair, in the order of `loaded.pairs`."""
    model = loaded.model

    @jax.jit
    def of_batch(params: Any, batch: PairBatch) -> dict[str, Array]:
        hidden = hidden_states_of_pairs(params, model.config, batch)
        return {
            name: function(hidden, batch.response_length)
            for name, function in HIDDEN_SIMILARITIES.items()
        }

    parts = []
    for batch in track(loaded.batches(), "similarities", unit="batch"):
        real = np.asarray(batch.weight) > 0
        scores = jax.device_get(of_batch(model.params, batch))
        scores = {name: values[real] for name, values in scores.items()}
        rows = zip(batch.response_tokens[real], batch.response_length[real], strict=True)
        scores["edit"] = np.array(
            [
                edit_similarity(*(side[:n] for side, n in zip(sides, lengths, strict=True)))
                for sides, lengths in rows
            ]
        )
        parts.append(scores)
    return {name: np.concatenate([part[name] for part in parts]) for name in SIMILARITIES}


def least_similar(scores: Float[np.ndarray, " pairs"], fraction: float) -> Int[np.ndarray, " kept"]:
    """Indices of the pairs with the lowest scores, in order; of equal scores, the first.

    Args:
      scores: similarity of each pair.
      fraction: of the pairs; their number is rounded up.
    """
    number = math.ceil(fraction * len(scores))
    return np.sort(np.argsort(scores, kind="stable")[:number])


def write_scored_pairs(
    path: Path, loaded: ModelAndPairs, kept: Sequence[int], scores: Mapping[str, np.ndarray]
) -> None:
    """Write pairs as JSON Lines {prompt, chosen, rejected} with their scores.

    Args:
      path: of the file.
      loaded: with the pairs.
      kept: indices of the pairs to write.
      scores: of all pairs, by name.
    """
    numbers = np.asarray(loaded.pairs.record_index)
    rows = []
    for at in kept:
        record = loaded.records[int(numbers[at])]
        row = {"chosen": record.chosen, "rejected": record.rejected}
        row = prompt_fields(record.prompt) | row
        rows.append(row | {name: float(values[at]) for name, values in scores.items()})
    write_json_lines(path, rows)
