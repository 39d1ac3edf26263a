"""Held-out metrics during training: the objective's own, and the KL to the reference."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxalign.data.batches import PairBatch
from jaxalign.data.mixtures import BySource
from jaxalign.sharding import replicated, shard_batch
from jaxalign.training.calibration import reliability
from jaxalign.training.metrics import Mean, add_means, to_floats
from jaxalign.training.objectives import (
    Objective,
    PreferenceObjective,
    ReferencedBatch,
    TokenPreferenceObjective,
)
from jaxalign.training.reward_objectives import ScoreObjective
from jaxalign.training.step import TrainState, on_mesh

Evaluation = Callable[[TrainState, Any], dict[str, float]]
"""(state, frozen) -> held-out metrics."""


def evaluate_losses(
    objective: Objective, batches: Sequence[Any], mesh: Mesh, by_source: BySource | None = None
) -> Evaluation:
    """(state, frozen) -> the objective's own metrics over all held-out batches.

    Args:
      objective: of the stage.
      batches: held-out data; with `by_source`, each batch has records of one source.
      mesh: of the devices.
      by_source: sources whose metrics are also given apart, as by_source/LABEL/...; None: none.
    """

    def step(params: Any, frozen: Any, batch: Any) -> Any:
        outputs = objective.forward(params, frozen, batch, None)
        return objective.reduce(outputs, batch, objective.count(batch))[1]

    compiled = jax.jit(on_mesh(step, mesh))

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        def means(batch: Any) -> Any:
            return compiled(state.params, frozen, shard_batch(batch, mesh))

        return _summed(means, batches, by_source)

    return run


def _summed(
    means: Callable[[Any], dict[str, Mean]], batches: Sequence[Any], by_source: BySource | None
) -> dict[str, float]:
    """Metrics over all batches, with equal weight for every row, and over those of each source."""
    totals: dict[str, dict[str, Mean]] = {}
    for batch in batches:
        label = "" if by_source is None else by_source.label(int(batch.record_index[0]))
        of_batch = dict(means(batch))
        totals[label] = add_means(totals[label], of_batch) if label in totals else of_batch
    of_all = functools.reduce(add_means, totals.values())
    metrics, totals = to_floats(jax.device_get(of_all)), jax.device_get(totals)
    if by_source is not None:
        for label, total in totals.items():
            metrics |= _of_source(label, to_floats(total))
    return metrics


def _of_source(label: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"by_source/{label}/{name}": value for name, value in metrics.items()}


def each_source(
    metrics_of: Callable[[np.ndarray], dict[str, float]],
    number: np.ndarray,
    by_source: BySource | None,
) -> dict[str, float]:
    """Metrics of all rows, and of those of each source.

    Args:
      metrics_of: indices of rows -> metrics.
      number: of each row's record.
      by_source: the sources of the records; None: one.
    """
    metrics = metrics_of(np.arange(len(number)))
    if by_source is not None:
        parts = by_source.members(number)
        for label, rows in zip(by_source.labels, parts, strict=True):
            if len(rows):
                metrics |= _of_source(label, metrics_of(rows))
    return metrics


def evaluate_preferences(
    objective: PreferenceObjective | TokenPreferenceObjective,
    batches: Sequence[PairBatch],
    mesh: Mesh,
    by_source: BySource | None = None,
) -> Evaluation:
    """(state, frozen) -> loss, log-probs, rewards, margin, accuracy and KL on held-out pairs.

    `kl` is the divergence KL(policy || reference) of the next-token distributions in nats per
    token, exact at each position and averaged over the positions of the chosen responses: an
    estimate of the policy's own KL, which would average over the policy's own samples. There is no
    `kl` if the objective has no reference.

    Args:
      objective: of the stage.
      batches: held-out pairs.
      mesh: of the devices.
      by_source: sources of the pairs, whose metrics are also given apart, as by_source/LABEL/...,
        each as if its pairs alone were held out; None: none.
    """
    if isinstance(objective, TokenPreferenceObjective):
        return _evaluate_token_preferences(objective, batches, mesh, by_source)
    has_reference = objective.has_reference

    def forward(params: Any, frozen: Any, batch: ReferencedBatch) -> Any:
        pairs, kl = batch.pairs, None
        if has_reference:
            outputs, divergence = objective.compare(params, frozen, batch)
            kl = divergence[:, 0]
        else:
            outputs = objective.forward(params, frozen, batch, None)
        return outputs, kl, pairs.response_length, pairs.record_index, pairs.weight

    compiled = jax.jit(on_mesh(forward, mesh), out_shardings=replicated(mesh))
    reduce = jax.jit(lambda *arguments: objective.reduce(*arguments)[1])

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        parts = []
        for batch in batches:
            placed = shard_batch(ReferencedBatch(pairs=batch, reference=None), mesh)
            rows = jax.device_get(compiled(state.params, frozen, placed))
            parts.append(jax.tree.map(lambda x, kept=rows[-1] > 0: x[kept], rows))
        rows = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        order = np.argsort(rows[3], kind="stable")  # the sum does not depend on the batches
        rows = jax.tree.map(lambda x: x[order], rows)
        running = jax.device_get(state.running)

        def metrics_of(which: np.ndarray) -> dict[str, float]:
            outputs, kl, lengths, number, weight = jax.tree.map(lambda x: x[which], rows)
            pairs = _without_tokens(lengths, number, weight)
            held_out = ReferencedBatch(pairs=pairs, reference=None)
            metrics = to_floats(reduce(outputs, held_out, np.float32(weight.sum()), running))
            if kl is not None:
                metrics["kl"] = float(kl.sum(dtype=np.float64) / lengths[:, 0].sum())
            return metrics

        return each_source(metrics_of, rows[3], by_source)

    return run


def _evaluate_token_preferences(
    objective: TokenPreferenceObjective,
    batches: Sequence[PairBatch],
    mesh: Mesh,
    by_source: BySource | None,
) -> Evaluation:
    """As `evaluate_preferences`, for losses in which pairs are independent."""

    def step(params: Any, frozen: Any, batch: ReferencedBatch) -> Any:
        outputs = objective.forward(params, frozen, batch, None)
        metrics = objective.reduce(outputs, batch, objective.count(batch))[1]
        policy = objective.policy
        own = policy.policy_params(params, frozen["policy"])
        both = policy.compare(batch.pairs, own, frozen["reference"])
        return metrics | _divergence_per_token(both.kl[:, 0].sum(-1), batch.pairs)

    compiled = jax.jit(on_mesh(step, mesh))

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        def means(batch: PairBatch) -> Any:
            placed = shard_batch(ReferencedBatch(pairs=batch, reference=None), mesh)
            return compiled(state.params, frozen, placed)

        return _summed(means, batches, by_source)

    return run


def _divergence_per_token(kl: Float[Array, " pairs"], pairs: PairBatch) -> dict[str, Mean]:
    """KL to the reference over the tokens of the chosen responses."""
    tokens = jnp.sum(pairs.response_length[:, 0] * pairs.weight).astype(jnp.float32)
    return {"kl": Mean(total=jnp.sum(kl * pairs.weight), count=tokens)}


def _without_tokens(lengths: np.ndarray, number: np.ndarray, weight: np.ndarray) -> PairBatch:
    """Held-out pairs without their tokens, which the loss and its metrics do not read."""
    no_tokens = np.zeros((*lengths.shape, 0), np.int32)
    return PairBatch(
        tokens=no_tokens,
        prompt_length=np.zeros_like(lengths),
        response_tokens=no_tokens,
        response_length=lengths,
        record_index=number,
        weight=weight,
    )


def evaluate_scores(
    objective: ScoreObjective,
    batches: Sequence[Any],
    mesh: Mesh,
    by_source: BySource | None = None,
) -> Evaluation:
    """(state, frozen) -> the objective's metrics on held-out pairs, and their calibration.

    `calibration/error` is the expected calibration error, and `calibration/LOW/...` are the
    non-empty bins of `reliability`, named by their lower end.

    Args:
      objective: of the stage.
      batches: held-out pairs.
      mesh: of the devices.
      by_source: as in `evaluate_preferences`.
    """

    def step(params: Any, frozen: Any, batch: Any) -> Any:
        scores = objective.forward(params, frozen, batch, None)
        return objective.values(scores, **objective.options), batch.record_index, batch.weight

    compiled = jax.jit(on_mesh(step, mesh), out_shardings=replicated(mesh))

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        parts = []
        for batch in batches:
            rows = jax.device_get(compiled(state.params, frozen, shard_batch(batch, mesh)))
            parts.append(jax.tree.map(lambda x, kept=rows[-1] > 0: x[kept], rows[:-1]))
        values, number = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)

        def metrics_of(which: np.ndarray) -> dict[str, float]:
            table = reliability(values["preferences/chosen"][which])
            metrics = {name: float(value[which].mean()) for name, value in values.items()}
            metrics["calibration/error"] = table.error
            for row in table.rows():
                name = f"calibration/{row['from']:.2f}"
                keys = ("pairs", "confidence", "accuracy")
                metrics |= {f"{name}/{key}": row[key] for key in keys}
            return metrics

        return each_source(metrics_of, number, by_source)

    return run
