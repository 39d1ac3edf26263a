"""The training step: a pure function, and the one place where it is compiled and sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxalign.records import record
from jaxalign.sharding import batch_sharding, parameter_shardings, replicated
from jaxalign.training.metrics import Mean, add_means
from jaxalign.training.objectives import Objective

Params = Any


@record
class TrainState:
    """All arrays that a run must save to go on; `params` are the trained ones alone."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: Any
    skipped: Int[Array, ""]


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """Step zero."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.int32(0),
    )


def split_micro_batches(batch: Any, parts: int) -> Any:
    """[rows, ...] -> [parts, rows / parts, ...], each part spread over all devices."""

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _join_micro_batches(parts: Any) -> Any:
    """The inverse of `split_micro_batches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def gradients(
    objective: Objective,
    trained: Params,
    frozen: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    micro_batches: int = 1,
) -> tuple[Params, dict[str, Mean]]:
    """The gradient of the mean loss over the whole batch, and the batch's metrics.

    With micro-batches the result is the same: each part's loss is divided by the whole batch's
    weight. Where the loss couples rows (a batch statistic), a first pass collects the outputs of
    all parts, the loss is differentiated in these, and a second pass pulls each part's cotangent
    back through the network.
    """
    count = objective.count(batch)

    def share(trained, part, key):
        return objective.reduce(objective.forward(trained, frozen, part, key), part, count)

    if micro_batches == 1:
        (_, metrics), grads = jax.value_and_grad(share, has_aux=True)(trained, batch, key)
        return grads, metrics

    parts = split_micro_batches(batch, micro_batches)
    keys = jax.random.split(key, micro_batches)
    zeros = jax.tree.map(jnp.zeros_like, trained)

    if not objective.coupled:

        def add_part(carry, part_and_key):
            grads, metrics = carry
            (_, new), more = jax.value_and_grad(share, has_aux=True)(trained, *part_and_key)
            return (jax.tree.map(jnp.add, grads, more), add_means(metrics, new)), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        shapes = jax.eval_shape(lambda part, key: share(trained, part, key)[1], *first)
        no_metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add_part, (zeros, no_metrics), (parts, keys))
        return grads, metrics

    def forward(part, key):
        return objective.forward(trained, frozen, part, key)

    outputs = _join_micro_batches(jax.lax.map(lambda x: forward(*x), (parts, keys)))
    (_, metrics), cotangents = jax.value_and_grad(
        lambda outputs: objective.reduce(outputs, batch, count), has_aux=True
    )(outputs)

    def pull_back(grads, part_key_cotangent):
        part, key, cotangent = part_key_cotangent
        _, vjp = jax.vjp(lambda trained: objective.forward(trained, frozen, part, key), trained)
        return jax.tree.map(jnp.add, grads, vjp(cotangent)[0]), None

    pulled = (parts, keys, split_micro_batches(cotangents, micro_batches))
    return jax.lax.scan(pull_back, zeros, pulled)[0], metrics


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Any,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, Mean | Float[Array, ""]]]:
    """One update on one batch; an update that is not finite leaves the parameters as they were."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grads, metrics = gradients(
        objective, state.params, frozen, batch, key, micro_batches=micro_batches
    )
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(grad_norm)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    after = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        key=state.key,
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    return after, {**metrics, "grad_norm": grad_norm, "skipped": after.skipped, "finite": finite}


def compile_step(step: Callable, state: TrainState, mesh: Mesh) -> Callable:
    """`step(state, frozen, batch)` under `jit`: state donated, batch split over data and fsdp."""
    state_shardings = parameter_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, None, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
