"""Held-out metrics during training: the objective's own, and the KL to the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.sharding import batch_sharding, replicated
from jaxalign.training.calibration import reliability
from jaxalign.training.loop import evaluate
from jaxalign.training.metrics import Mean
from jaxalign.training.objectives import (
    Objective,
    PreferenceObjective,
    ReferencedBatch,
    TokenPreferenceObjective,
)
from jaxalign.training.reward_objectives import ScoreObjective
from jaxalign.training.step import on_mesh


def _put(batch: Any, mesh: Mesh) -> Any:
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def evaluate_losses(
    objective: Objective, batches: Sequence[Any], mesh: Mesh
) -> Callable[[Any, Any], dict[str, float]]:
    """(params, frozen) -> the objective's own metrics over all held-out batches."""

    def step(params: Any, frozen: Any, batch: Any) -> Any:
        outputs = objective.forward(params, frozen, batch, None)
        return objective.reduce(outputs, batch, objective.count(batch))[1]

    compiled = jax.jit(on_mesh(step, mesh))

    def run(params: Any, frozen: Any) -> dict[str, float]:
        return evaluate(compiled, params, frozen, [_put(batch, mesh) for batch in batches])

    return run


def evaluate_preferences(
    objective: PreferenceObjective | TokenPreferenceObjective, batches: Sequence[Any], mesh: Mesh
) -> Callable[[Any, Any], dict[str, float]]:
    """(params, frozen) -> loss, log-probs, rewards, margin, accuracy and KL on held-out pairs.

    `kl` is the divergence KL(policy || reference) of the next-token distributions in nats per
    token, exact at each position and averaged over the positions of the chosen responses: an
    estimate of the policy's own KL, whose positions would be its own samples'.
    """

    def step(params: Any, frozen: Any, batch: ReferencedBatch) -> Any:
        outputs: Any = objective.forward(params, frozen, batch, None)
        metrics = objective.reduce(outputs, batch, objective.count(batch))[1]
        policy, weight = objective.policy, batch.pairs.weight
        arguments = policy.policy(params, frozen["policy"])
        kl = policy.compare(batch.pairs, frozen["reference"], **arguments).kl[:, 0].sum(-1)
        tokens = jnp.sum(batch.pairs.response_length[:, 0] * weight).astype(jnp.float32)
        return metrics | {"kl": Mean(total=jnp.sum(kl * weight), count=tokens)}

    compiled = jax.jit(on_mesh(step, mesh))

    def run(params: Any, frozen: Any) -> dict[str, float]:
        placed = [_put(ReferencedBatch(pairs=batch, reference=None), mesh) for batch in batches]
        return evaluate(compiled, params, frozen, placed)

    return run


def evaluate_scores(
    objective: ScoreObjective, batches: Sequence[Any], mesh: Mesh
) -> Callable[[Any, Any], dict[str, float]]:
    """(params, frozen) -> the objective's numbers on held-out pairs, and their calibration.

    `calibration/error` is the expected calibration error, and `calibration/LOW/...` are the bins of
    `reliability` that hold any pair, named by their lower end.
    """

    def step(params: Any, frozen: Any, batch: Any) -> Any:
        scores = objective.forward(params, frozen, batch, None)
        return objective.values(scores, **objective.options), batch.weight

    compiled = jax.jit(on_mesh(step, mesh), out_shardings=replicated(mesh))

    def run(params: Any, frozen: Any) -> dict[str, float]:
        parts = []
        for batch in batches:
            values, weight = jax.device_get(compiled(params, frozen, _put(batch, mesh)))
            parts.append({name: value[weight > 0] for name, value in values.items()})
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        table = reliability(values["preferences/chosen"])
        found = {name: float(value.mean()) for name, value in values.items()}
        found["calibration/error"] = table.error
        for row in table.rows():
            name = f"calibration/{row['from']:.2f}"
            found |= {f"{name}/{key}": row[key] for key in ("pairs", "confidence", "accuracy")}
        return found

    return run
