"""What the responses to a prompt do to each other's log-probs, measured in an online step."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.entanglement.geometry import group_geometry
from jaxalign.entanglement.groups import Counted, GroupGeometry, part_summary, summary
from jaxalign.models.score import SCORE
from jaxalign.online.objective import OnlineObjective, RolloutOutputs
from jaxalign.online.rollouts import RolloutBatch
from jaxalign.records import record
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.step import Update

Params = Any


@record
class GroupObservation:
    """Statistics of the groups of a batch before its update.

    Attributes:
      geometry: path of each matrix -> its contribution, "" -> of all trained parameters. Effects
        are those of the batch's mean loss.
      advantage: minus the derivative of that loss with respect to each response's log-prob, where
        the reference is the policy: what the rewards or preferences do without the divergence.
      log_prob: of each response, in nats.
    """

    geometry: Mapping[str, GroupGeometry]
    advantage: Float[Array, "prompts samples"]
    log_prob: Float[Array, "prompts samples"]


@dataclass(frozen=True, kw_only=True)
class GroupProbe:
    """Statistics of the gradients of a group's responses: `backward` of `train_step`.

    The update is the plain step's. The statistics come from a pass of their own, over the policy
    without adapters' dropout. They count what reaches the parameters through the log-probs; a
    critic's loss is left out.
    """

    objective: OnlineObjective
    parts: bool = False
    """Whether to also log the numbers by layer and by kind of matrix."""
    realised: bool = False
    """Whether to recompute the batch's log-probs after the update."""

    def __call__(
        self,
        objective: Any,
        trained: Params,
        frozen: Any,
        part: RolloutBatch,
        key: PRNGKeyArray,
        *,
        reduce: Callable[..., Any],
        count: Float[Array, ""],
        output_gradients: RolloutOutputs | None,
    ) -> tuple[Params, dict[str, Mean], GroupObservation]:
        """The gradient and the metrics of a part, and the statistics of its groups."""
        del objective, count  # the first is self.objective
        outputs, backward = jax.vjp(
            lambda trained: self.objective.forward(trained, frozen, part, key), trained
        )
        metrics: dict[str, Mean] = {}
        if output_gradients is None:
            output_gradients, metrics = jax.grad(reduce, has_aux=True)(outputs, part)
        assert output_gradients is not None
        silent = dataclasses.replace(outputs, reference=outputs.log_prob)
        without_divergence, _ = jax.grad(reduce, has_aux=True)(silent, part)
        observation = GroupObservation(
            geometry=self.geometry(trained, frozen, part, -output_gradients.log_prob),
            advantage=-without_divergence.log_prob.sum(-1),
            log_prob=outputs.log_prob.sum(-1),
        )
        return backward(output_gradients)[0], metrics, observation

    def geometry(
        self,
        trained: Params,
        frozen: Any,
        batch: RolloutBatch,
        coefficients: Float[Array, "prompts samples response"],
    ) -> dict[str, GroupGeometry]:
        """Inner products of the responses' gradients, given the tokens' coefficients."""
        policy = self.objective.policy
        model = {name: tree for name, tree in trained.items() if name != SCORE}
        scale = policy.adapter_scale
        found = group_geometry(
            model if scale is None else frozen["policy"],
            policy.config,
            self.objective.first(batch.responses),
            coefficients,
            adapters=None if scale is None else model,
            adapter_scale=1.0 if scale is None else scale,
            compute=policy.compute,
        )
        return found if self.parts else {"": found[""]}

    def after_update(
        self,
        statistics: GroupObservation,
        update: Update,
        frozen: Any,
        batch: RolloutBatch,
        micro_batches: int,
    ) -> dict[str, Mean]:
        """Means over the responses, or over pairs of them; effects are of each prompt alone."""
        weight, realised = batch.responses.weight, None
        if self.realised:
            parts = split_micro_batches(batch, micro_batches)
            after = join_micro_batches(
                jax.lax.map(lambda x: self.log_prob(update.after, frozen, x), parts)
            )
            realised = after - statistics.log_prob
        means = {}
        for path, geometry in statistics.geometry.items():
            alone = dataclasses.replace(geometry, effects=geometry.effects * weight.sum())
            if not path:
                means |= _means(summary(alone, statistics.advantage, realised), weight)
                continue
            for label, layer in _layers(path, alone):
                numbers = part_summary(layer, statistics.advantage)
                means |= _means({f"{label}/{name}": x for name, x in numbers.items()}, weight)
        return means

    def log_prob(
        self, trained: Params, frozen: Any, batch: RolloutBatch
    ) -> Float[Array, "prompts samples"]:
        """Log-probs of the responses, in nats."""
        return self.objective.forward(trained, frozen, batch, None).log_prob.sum(-1)


def _layers(path: str, geometry: GroupGeometry) -> list[tuple[str, GroupGeometry]]:
    """The geometry of each layer of a matrix, under the name of its metrics."""
    if geometry.effects.ndim == 3:
        return [(path, geometry)]
    layers = geometry.effects.shape[1]
    return [
        (f"{path}/{layer}", jax.tree.map(lambda x, layer=layer: x[:, layer], geometry))
        for layer in range(layers)
    ]


def _means(numbers: Mapping[str, Counted], weight: Float[Array, " prompts"]) -> dict[str, Mean]:
    """The means of metrics where they count and are defined."""
    means = {}
    for name, (values, counts) in numbers.items():
        weights = counts * weight.reshape(-1, *[1] * (values.ndim - 1)) * jnp.isfinite(values)
        means[f"entanglement/{name}"] = mean_of(values.ravel(), weights.ravel())
    return means
