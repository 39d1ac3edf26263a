"""The training step: a pure function, compiled and sharded here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxalign.models.devices import splitting_states
from jaxalign.records import record
from jaxalign.sharding import (
    batch_sharding,
    head_sharding,
    parameter_shardings,
    replicated,
    state_sharding,
    table_sharding,
)
from jaxalign.training.gradients import PLAIN, Backward, Update
from jaxalign.training.moving_reference import MovingReference
from jaxalign.training.objectives import Objective
from jaxalign.training.switched import gradients

Params = Any


@record
class TrainState:
    """All arrays that a run must save to resume; `params` holds only the trained parameters."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: Any
    skipped: Int[Array, ""]
    running: Any = dataclasses.field(default_factory=dict)
    """The loss's running statistics, by name; most losses have none."""
    reference: Any = None
    """Parameters of a reference that moves; None: the reference is fixed."""


def saved_fields(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state, by field.

    Running statistics are saved apart from the arrays. A reference is only there if it moves, so
    that checkpoints of earlier versions have the same fields.
    """
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if state.reference is None:
        del fields["reference"]
    return fields | {"running": {}}


def initial_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    running: Mapping[str, float] | None = None,
    moving: MovingReference | None = None,
) -> TrainState:
    """The state before the first update.

    Args:
      params: the trained parameters.
      optimizer: the update rule.
      seed: of dropout and all other random draws of a step.
      running: the loss's running statistics at the start (`Statistics.start`).
      moving: a reference that follows the policy. It shares the buffers of `params`; copy the state
        (`sharding.place`) before it is donated. None: the reference is fixed.
    """
    return TrainState(
        reference=None if moving is None else moving.start(params),
        running={name: jnp.float32(value) for name, value in (running or {}).items()},
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.int32(0),
    )


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Any,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    backward: Backward = PLAIN,
    moving: MovingReference | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One update on one batch; an update that is not finite is skipped.

    A reference that moves is read from the state, and moves after the update.
    """
    if moving is not None:
        frozen = moving.frozen(state.reference, frozen)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grads, metrics, statistics = gradients(
        objective,
        state.params,
        frozen,
        batch,
        key,
        micro_batches=micro_batches,
        backward=backward,
        running=state.running,
    )
    running = {name: metrics[f"statistics/{name}"].total for name in state.running}
    with jax.named_scope("update"):
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(grad_norm)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    update = Update(before=state.params, gradient=grads, after=params, opt_state=opt_state, key=key)
    metrics |= backward.after_update(statistics, update, frozen, batch, micro_batches)
    params = keep(params, state.params)
    reference = state.reference
    if moving is not None:
        reference = moving.moved(reference, params, state.step + 1)
    after = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=keep(opt_state, state.opt_state),
        key=state.key,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        running=keep(running, state.running),
        reference=reference,
    )
    return after, {**metrics, "grad_norm": grad_norm, "skipped": after.skipped, "finite": finite}


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, with hidden states sharded by rows and positions throughout."""

    @functools.wraps(function)
    def placed(*arguments: Any) -> Any:
        with splitting_states(state_sharding(mesh), table_sharding(mesh), head_sharding(mesh)):
            return function(*arguments)

    return placed


def compile_step(step: Callable, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """`step(state, frozen, batch)` under `jit`: state donated, batch split over data and fsdp."""
    state_shardings = parameter_shardings(state, mesh)
    return jax.jit(
        on_mesh(step, mesh),
        in_shardings=(state_shardings, None, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
