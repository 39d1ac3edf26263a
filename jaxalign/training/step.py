"""The training step: a pure function, compiled and sharded here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxalign.models.devices import splitting_states
from jaxalign.models.experts import BALANCE, STATISTICS, balance_probe
from jaxalign.records import record
from jaxalign.sharding import (
    batch_sharding,
    head_sharding,
    parameter_shardings,
    replicated,
    state_sharding,
    table_sharding,
)
from jaxalign.training.metrics import Mean, add_means
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.moving_reference import MovingReference
from jaxalign.training.objectives import Objective, PreferenceObjective

Params = Any
Reduce = Callable[[Any, Any], tuple[Float[Array, ""], dict[str, Mean]]]


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


RECORDS = "records"
"""Key of a step's numbers of single pairs among its metrics; a `Feed` says what becomes of them."""


@record
class Update:
    """What a step did to the trained parameters.

    Attributes:
      before: the parameters of the forward and backward pass.
      gradient: of the loss, as the optimiser got it.
      after: the updated parameters.
      opt_state: the optimiser's state after the update.
      key: of the step's dropout.
    """

    before: Any
    gradient: Any
    after: Any
    opt_state: Any
    key: Any


@runtime_checkable
class Backward(Protocol):
    """The backward pass of a part of a batch; `train_step` takes it as an argument."""

    def __call__(
        self,
        objective: Objective,
        trained: Params,
        frozen: Any,
        part: Any,
        key: PRNGKeyArray,
        *,
        reduce: Reduce,
        count: Float[Array, ""],
        output_gradients: Any | None,
    ) -> tuple[Params, dict[str, Mean], Any]:
        """The gradient of a part, its metrics, and its statistics for `after_update`.

        Args:
          objective: what is minimised.
          trained: parameters.
          frozen: what the step reads and never changes.
          part: of the batch.
          key: of dropout.
          reduce: (outputs, part) -> (loss, metrics).
          count: weight of the whole batch.
          output_gradients: derivatives of the loss with respect to the part's outputs; None: to
            be computed from `reduce`.
        """
        ...

    def after_update(
        self,
        statistics: Any,
        update: "Update",
        frozen: Any,
        batch: Any,
        micro_batches: int,
    ) -> dict[str, Any]:
        """Metrics of the statistics, given the update; under `RECORDS`, what is kept by pair."""
        ...


class PlainBackward:
    """Reverse-mode differentiation without statistics."""

    def __call__(
        self, objective, trained, frozen, part, key, *, reduce, count, output_gradients
    ) -> tuple[Params, dict[str, Mean], None]:
        """The gradient and the metrics of a part."""
        del count
        outputs, backward = jax.vjp(lambda p: objective.forward(p, frozen, part, key), trained)
        metrics = {}
        if output_gradients is None:
            output_gradients, metrics = jax.grad(reduce, has_aux=True)(outputs, part)
        return backward(output_gradients)[0], metrics, None

    def after_update(self, statistics, update, frozen, batch, micro_batches) -> dict[str, Any]:
        """No metrics: there are no statistics."""
        del statistics, update, frozen, batch, micro_batches
        return {}


PLAIN = PlainBackward()


def gradients(
    objective: Objective,
    trained: Params,
    frozen: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    micro_batches: int = 1,
    backward: Backward = PLAIN,
    running: Mapping[str, Array] | None = None,
) -> tuple[Params, dict[str, Mean], Any]:
    """The gradient of the mean loss over the whole batch, the batch's metrics and its statistics.

    Micro-batches do not change the result: each part's loss is divided by the whole batch's weight.
    Where the loss couples rows (a batch statistic), a first pass collects the outputs of all parts,
    the loss is differentiated with respect to these, and a second pass backpropagates each part's
    cotangents. The load-balancing loss of experts is that of each part (`balance_probe_of`).
    The loss's running statistics, updated with this batch, are returned as the metrics
    `statistics/NAME`.
    """
    count = objective.count(batch)
    probe = balance_probe_of(objective, micro_batches)

    def reduce(outputs: Any, rows: Any) -> tuple[Float[Array, ""], dict[str, Mean]]:
        if not running:
            return objective.reduce(outputs, rows, count)
        preference = cast(PreferenceObjective, objective)  # no other has running statistics
        updated = preference.update_running(running, outputs, rows)
        return preference.reduce(outputs, rows, count, updated)

    def of_part(part, key, output_gradients=None):
        together = probe is not None and isinstance(backward, PlainBackward)
        grads, metrics, statistics = backward(
            objective,
            {**trained, BALANCE: probe} if together else trained,
            frozen,
            part,
            key,
            reduce=reduce,
            count=count,
            output_gradients=output_gradients,
        )
        if together:
            grads = dict(grads)
            metrics = metrics | balance_metrics(grads.pop(BALANCE))
        elif probe is not None:  # by a pass of its own: it is in no pair's statistics
            own = {**trained, BALANCE: probe}
            more = dict(_balance_gradient(objective, own, frozen, part, key))
            metrics = metrics | balance_metrics(more.pop(BALANCE))
            grads = jax.tree.map(jnp.add, grads, more)
        return grads, metrics, statistics

    if micro_batches == 1:
        return of_part(batch, key)

    parts = split_micro_batches(batch, micro_batches)
    keys = jax.random.split(key, micro_batches)
    zeros = jax.tree.map(jnp.zeros_like, trained)

    if objective.coupled:

        def forward(part_and_key):
            part, key = part_and_key
            return objective.forward(trained, frozen, part, key)

        outputs = join_micro_batches(jax.lax.map(forward, (parts, keys)))
        output_gradients, metrics = jax.grad(reduce, has_aux=True)(outputs, batch)

        def pull_back(grads, inputs):
            more, own, statistics = of_part(*inputs)
            return jax.tree.map(jnp.add, grads, more), (own, statistics)

        pulled = (parts, keys, split_micro_batches(output_gradients, micro_batches))
        grads, (own, statistics) = jax.lax.scan(pull_back, zeros, pulled)
        metrics = metrics | jax.tree.map(lambda x: x.sum(0), own)
        return grads, metrics, join_micro_batches(statistics)

    def add_part(carry, part_and_key):
        grads, metrics = carry
        more, new, statistics = of_part(*part_and_key)
        return (jax.tree.map(jnp.add, grads, more), add_means(metrics, new)), statistics

    first = jax.tree.map(lambda x: x[0], (parts, keys))
    shapes = jax.eval_shape(lambda part, key: of_part(part, key)[1], *first)
    no_metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), statistics = jax.lax.scan(add_part, (zeros, no_metrics), (parts, keys))
    return grads, metrics, join_micro_batches(statistics)


def balance_probe_of(objective: Objective, micro_batches: int) -> Float[Array, "layers 3"] | None:
    """The probe of the load-balancing loss of each part's experts; None: the policy has none.

    The loss is a product of means over tokens, so it is defined over those that are computed
    together: the loss of a batch is the mean of those of its micro-batches.
    """
    policy = getattr(objective, "policy", None)
    experts = getattr(getattr(policy, "config", None), "experts", None)
    if policy is None or experts is None:
        return None
    return balance_probe(policy.config, experts.balance_weight / micro_batches)


def balance_metrics(statistics: Float[Array, "layers 3"]) -> dict[str, Mean]:
    """Means over layers and micro-batches of the experts' statistics, as `router/...`."""
    return {
        f"router/{name}": Mean(total=value, count=jnp.float32(1))
        for name, value in zip(STATISTICS, statistics.mean(0), strict=True)
    }


def _balance_gradient(
    objective: Objective, trained: Params, frozen: Any, part: Any, key: PRNGKeyArray
) -> Params:
    """The gradient of the load-balancing loss alone."""
    outputs, pull = jax.vjp(lambda p: objective.forward(p, frozen, part, key), trained)
    return pull(jax.tree.map(jnp.zeros_like, outputs))[0]


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
