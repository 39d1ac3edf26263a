"""The gradient of a loss over a whole batch, whose micro-batches change nothing."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.models.experts import BALANCE, STATISTICS, balance_probe
from jaxalign.records import record
from jaxalign.training.metrics import Mean, add_means
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.objectives import Objective, PreferenceObjective

Params = Any
Reduce = Callable[[Any, Any], tuple[Float[Array, ""], dict[str, Mean]]]


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


def plain_gradients(
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
