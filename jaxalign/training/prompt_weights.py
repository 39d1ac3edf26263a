"""Weights of undesirable responses whose prompts are drawn as those of desirable ones are not."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxalign.data.batches import PairBatch
from jaxalign.data.labelled import LabelledBatch
from jaxalign.errors import notice
from jaxalign.files import read_arrays, write_arrays
from jaxalign.models import decoder, encoder_decoder
from jaxalign.models.config import DecoderConfig
from jaxalign.progress import track
from jaxalign.sharding import replicated
from jaxalign.sharding.processes import broadcast_flag
from jaxalign.training.objectives import Policy
from jaxalign.training.step import on_mesh

SMALLEST, LARGEST = 0.5, 10.0
"""Bounds of a weight: those of TRL's `BCOConfig`."""
SAMPLE = 1024
"""Most prompts of each label that a classifier is fitted to: that of TRL's `BCOConfig`."""

Embeddings = Float[np.ndarray, "rows width"]
Fit = Callable[..., Float[np.ndarray, " coefficients"]]


def density_ratios(
    embeddings: Embeddings, desirable: Bool[np.ndarray, " rows"], *, fit: Fit, seed: int
) -> Float[np.ndarray, " rows"]:
    r"""Underlying distribution matching: how much likelier a prompt is among desirable responses.

    .. math:: w(x) = \mathrm{clip}\Bigl(\frac{p(D \mid x)}{1 - p(D \mid x)}, \; 0.5, \; 10\Bigr)

    p is a logistic regression on the prompts' embeddings, with both labels weighed equally and a
    ridge of 1 on all coefficients but the intercept, as in TRL's BCO trainer.

    Args:
      embeddings: of the prompts.
      desirable: labels of their responses; there are both.
      fit: `jaxalign.evaluation.logistic.fit_logistic`.
      seed: of the sample of 1024 prompts of each label, where there are more.

    Returns:
      w of every undesirable response, 1 of the desirable ones.

    References:
      Jung et al., 2024, arXiv:2404.04656, section 4.2; TRL's `BCOTrainer._get_udm_weight`.
    """
    draw = np.random.default_rng(seed)
    places = [np.flatnonzero(desirable), np.flatnonzero(~desirable)]
    taken = np.concatenate([np.sort(draw.permutation(one)[:SAMPLE]) for one in places])
    x = np.concatenate([np.float64(embeddings), np.ones((len(embeddings), 1))], axis=1)
    label = desirable[taken].astype(np.float64)
    share = np.where(label > 0, label.mean(), 1 - label.mean())
    ridge = np.append(np.ones(embeddings.shape[1]), 0.0)
    coefficients = fit(x[taken], label, weight=1 / (2 * share), ridge=ridge)
    odds = np.exp(np.minimum(x @ coefficients, np.log(LARGEST)))
    return np.where(desirable, 1.0, np.maximum(odds, SMALLEST))


def prompt_embeddings(
    policy: Policy, params: Any, responses: PairBatch
) -> Float[Array, "rows width"]:
    """Means of the last hidden states over the tokens of each prompt, in float32."""
    tokens, length = responses.tokens[:, 0], responses.prompt_length
    if responses.scored_positions is not None:
        length = responses.scored_positions[:, :, 0] + 1
    is_prompt = jnp.arange(tokens.shape[1])[None] < length
    if isinstance(policy.config, DecoderConfig):
        states = decoder.hidden_states(params, policy.config, tokens, compute=policy.compute)
    else:
        mask = is_prompt.astype(jnp.int32)
        states = encoder_decoder.encode(params, policy.config, tokens, mask, compute=policy.compute)
    kept = jnp.where(is_prompt[..., None], states.astype(jnp.float32), 0.0)
    return kept.sum(1) / jnp.maximum(length, 1)


def precompute_prompt_weights(
    policy: Policy,
    params: Any,
    batches: Iterable[LabelledBatch],
    put: Callable[[Any], Any],
    path: Path,
    mesh: Mesh,
    fingerprint: str,
    *,
    fit: Fit,
    seed: int,
) -> Float[np.ndarray, " records"]:
    """`density_ratios` of every training response, by record number.

    Args:
      policy: with the architecture.
      params: the reference's, whose hidden states are the embeddings.
      batches: every training response once, padded; filler rows have weight 0.
      put: host batch -> device batch.
      path: an .npz file; read if it is of these responses (in a resumed run), else written.
      mesh: the devices of `put`.
      fingerprint: of the data and weights.
      fit: as in `density_ratios`.
      seed: as in `density_ratios`.

    Returns:
      [largest record number + 1]; NaN where no response has that number.
    """
    known = None
    if jax.process_index() == 0 and path.exists():
        arrays = read_arrays(path, ("weights", "fingerprint"))
        if arrays is not None and str(arrays["fingerprint"]) == fingerprint:
            known = arrays["weights"]
        else:
            notice(f"{path}: computed from other data or weights; recomputed")
    if broadcast_flag(known is not None):
        return np.load(path, allow_pickle=False)["weights"] if known is None else known

    @partial(jax.jit, out_shardings=replicated(mesh))  # every process keeps the whole table
    @partial(on_mesh, mesh=mesh)
    def embed(params: Any, batch: LabelledBatch) -> tuple[Array, ...]:
        rows = batch.responses
        found = prompt_embeddings(policy, params, rows)
        return rows.weight, rows.record_index, batch.desirable, found

    parts = []
    for batch in track(list(batches), "embeddings of prompts", unit="batch"):
        weight, *values = map(np.asarray, embed(params, put(batch)))
        parts.append([x[weight > 0] for x in values])
    number, desirable, embeddings = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(number)
    number, desirable, embeddings = number[order], desirable[order], embeddings[order]
    table = np.full(number.max() + 1, np.nan, np.float32)
    table[number] = density_ratios(embeddings, desirable, fit=fit, seed=seed)
    if jax.process_index() == 0:
        write_arrays(path, weights=table, fingerprint=np.asarray(fingerprint))
    return table
