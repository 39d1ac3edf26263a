"""Held-out metrics during training: the objective's own, and the KL to the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxalign.data.batches import PairBatch
from jaxalign.sharding import replicated, shard_batch
from jaxalign.training.calibration import reliability
from jaxalign.training.loop import evaluate
from jaxalign.training.metrics import Mean, to_floats
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


def evaluate_losses(objective: Objective, batches: Sequence[Any], mesh: Mesh) -> Evaluation:
    """(state, frozen) -> the objective's own metrics over all held-out batches."""

    def step(params: Any, frozen: Any, batch: Any) -> Any:
        outputs = objective.forward(params, frozen, batch, None)
        return objective.reduce(outputs, batch, objective.count(batch))[1]

    compiled = jax.jit(on_mesh(step, mesh))

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        placed = [shard_batch(batch, mesh) for batch in batches]
        return evaluate(compiled, state.params, frozen, placed)

    return run


def evaluate_preferences(
    objective: PreferenceObjective | TokenPreferenceObjective,
    batches: Sequence[PairBatch],
    mesh: Mesh,
) -> Evaluation:
    """(state, frozen) -> loss, log-probs, rewards, margin, accuracy and KL on held-out pairs.

    `kl` is the divergence KL(policy || reference) of the next-token distributions in nats per
    token, exact at each position and averaged over the positions of the chosen responses: an
    estimate of the policy's own KL, which would average over the policy's own samples. There is no
    `kl` if the objective has no reference.
    """
    if isinstance(objective, TokenPreferenceObjective):
        return _evaluate_token_preferences(objective, batches, mesh)
    has_reference = objective.has_reference

    def forward(params: Any, frozen: Any, batch: ReferencedBatch) -> Any:
        kl: dict[str, Mean] = {}
        if has_reference:
            outputs, divergence = objective.compare(params, frozen, batch)
            kl = _divergence_per_token(divergence[:, 0], batch.pairs)
        else:
            outputs = objective.forward(params, frozen, batch, None)
        rows = outputs, batch.pairs.response_length, batch.pairs.record_index, batch.pairs.weight
        return rows, kl

    compiled = jax.jit(on_mesh(forward, mesh), out_shardings=replicated(mesh))
    reduce = jax.jit(lambda *arguments: objective.reduce(*arguments)[1])

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        parts, kl = [], []
        for batch in batches:
            placed = shard_batch(ReferencedBatch(pairs=batch, reference=None), mesh)
            rows, divergence = jax.device_get(compiled(state.params, frozen, placed))
            parts.append(jax.tree.map(lambda x, kept=rows[-1] > 0: x[kept], rows))
            kl.append(divergence)
        rows = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        order = np.argsort(rows[2], kind="stable")  # the sum does not depend on the batches
        outputs, lengths, number, weight = jax.tree.map(lambda x: x[order], rows)
        held_out = ReferencedBatch(pairs=_without_tokens(lengths, number, weight), reference=None)
        running = jax.device_get(state.running)
        metrics = to_floats(reduce(outputs, held_out, np.float32(weight.sum()), running))
        total = jax.tree.map(lambda *xs: np.sum(xs, dtype=np.float64), *kl)
        return metrics | to_floats(total)

    return run


def _evaluate_token_preferences(
    objective: TokenPreferenceObjective, batches: Sequence[PairBatch], mesh: Mesh
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
        placed = [
            shard_batch(ReferencedBatch(pairs=batch, reference=None), mesh) for batch in batches
        ]
        return evaluate(compiled, state.params, frozen, placed)

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


def evaluate_scores(objective: ScoreObjective, batches: Sequence[Any], mesh: Mesh) -> Evaluation:
    """(state, frozen) -> the objective's metrics on held-out pairs, and their calibration.

    `calibration/error` is the expected calibration error, and `calibration/LOW/...` are the
    non-empty bins of `reliability`, named by their lower end.
    """

    def step(params: Any, frozen: Any, batch: Any) -> Any:
        scores = objective.forward(params, frozen, batch, None)
        return objective.values(scores, **objective.options), batch.weight

    compiled = jax.jit(on_mesh(step, mesh), out_shardings=replicated(mesh))

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        parts = []
        for batch in batches:
            values, weight = jax.device_get(
                compiled(state.params, frozen, shard_batch(batch, mesh))
            )
            parts.append({name: value[weight > 0] for name, value in values.items()})
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        table = reliability(values["preferences/chosen"])
        metrics = {name: float(value.mean()) for name, value in values.items()}
        metrics["calibration/error"] = table.error
        for row in table.rows():
            name = f"calibration/{row['from']:.2f}"
            metrics |= {f"{name}/{key}": row[key] for key in ("pairs", "confidence", "accuracy")}
        return metrics

    return run
