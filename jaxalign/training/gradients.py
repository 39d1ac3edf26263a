"""The gradient of a loss over a whole batch, whose micro-batches change nothing."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

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
    cotangents. The loss's running statistics, updated with this batch, are returned as the metrics
    `statistics/NAME`.
    """
    count = objective.count(batch)

    def reduce(outputs: Any, rows: Any) -> tuple[Float[Array, ""], dict[str, Mean]]:
        if not running:
            return objective.reduce(outputs, rows, count)
        preference = cast(PreferenceObjective, objective)  # no other has running statistics
        updated = preference.update_running(running, outputs, rows)
        return preference.reduce(outputs, rows, count, updated)

    def of_part(part, key, output_gradients=None):
        return backward(
            objective,
            trained,
            frozen,
            part,
            key,
            reduce=reduce,
            count=count,
            output_gradients=output_gradients,
        )

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
            more, _, statistics = of_part(*inputs)
            return jax.tree.map(jnp.add, grads, more), statistics

        pulled = (parts, keys, split_micro_batches(output_gradients, micro_batches))
        grads, statistics = jax.lax.scan(pull_back, zeros, pulled)
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
