"""A step's backward pass with probes in it, from which the geometry of its pairs is read."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.entanglement import Coefficients, PairGeometry
from jaxalign.entanglement.cures import Cure
from jaxalign.entanglement.geometry import gram
from jaxalign.entanglement.observation import Observation, summary
from jaxalign.entanglement.probing import contributions, total, unweighted, zero_probes
from jaxalign.models.probes import with_probes
from jaxalign.training.masking import HEAD
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.objectives import PairOutputs, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import TrainState

Params = Any


@dataclass(frozen=True, kw_only=True)
class PairProbe:
    """Per-pair gradient statistics of a step: `backward` of `train_step`.

    The numbers are those of the pass that makes the update: float error aside it is the update
    that a step without a probe makes.
    """

    objective: PreferenceObjective
    parts: bool = False
    """Whether the geometry is broken down by layer and by kind of matrix."""
    cure: Cure | None = None
    """What changes the weights of the pairs' gradients (`entanglement.cures`): a second backward
    pass is made with them."""
    realised: bool = False
    """Whether the batch's log-probs are computed once more after the update."""
    preconditioner: Callable[[Any], Params] | None = None
    """Optimiser state after the update -> P of `preconditioned`, a tree like the parameters."""

    def __call__(
        self,
        objective: Any,
        trained: Params,
        frozen: Any,
        part: ReferencedBatch,
        key: PRNGKeyArray,
        *,
        reduce: Callable[..., Any],
        count: Float[Array, ""],
        output_gradients: PairOutputs | None,
    ) -> tuple[Params, dict[str, Mean], Observation]:
        """The gradient and the metrics of a part, and what the probes say of its pairs."""
        del objective  # the probe's own

        def forward(trained: Params, probes: dict[str, Any]) -> PairOutputs:
            return self.forward(trained, probes, frozen, part, key)

        outputs, backward = jax.vjp(forward, trained, self.probes(trained, frozen, part))
        metrics: dict[str, Mean] = {}
        if output_gradients is None:
            output_gradients, metrics = jax.grad(reduce, has_aux=True)(outputs, part)
        slopes: Any = output_gradients
        if self.cure is None:
            grads, cotangents = backward(slopes)
            return grads, metrics, self.read(cotangents, slopes, slopes, outputs, part, count)
        units = jax.tree.map(jnp.ones_like, slopes)
        seen = self.read(backward(units)[1], units, slopes, outputs, part, count)
        return backward(self.reweighted(slopes, seen, part, count))[0], metrics, seen

    def after_update(
        self,
        seen: Observation,
        before: TrainState,
        after: Params,
        opt_state: Any,
        frozen: Any,
        batch: ReferencedBatch,
        micro_batches: int,
    ) -> dict[str, Mean]:
        """Means over the pairs, with what can be said only when the update is known."""
        in_update = self.preconditioned(before.params, frozen, batch, opt_state)
        seen = dataclasses.replace(seen, preconditioned=in_update)
        outputs = self.outputs_after(after, frozen, batch, micro_batches)
        return self.metrics(seen, batch.pairs.weight, outputs)

    def probes(self, trained: Params, frozen: Any, batch: ReferencedBatch) -> dict[str, Any]:
        """Zeros whose cotangents are read by `read`."""
        policy = self.objective.policy
        adapted = policy.adapter_scale is not None
        tokens, response_tokens = self._rows(batch)
        model = {name: tree for name, tree in trained.items() if name != HEAD}
        return zero_probes(
            frozen["policy"] if adapted else model,
            policy.config,
            tokens,
            response_tokens,
            adapters=model if adapted else None,
        )

    def forward(
        self,
        trained: Params,
        probes: dict[str, Any],
        frozen: Any,
        batch: ReferencedBatch,
        key: PRNGKeyArray,
    ) -> PairOutputs:
        """The objective's forward pass with probes in place, each row by itself."""
        pairs = dataclasses.replace(batch.pairs, joint_tokens=None, common_length=None)
        batch = dataclasses.replace(batch, pairs=pairs)
        return self.objective.forward(with_probes(trained, probes), frozen, batch, key)

    def read(
        self,
        cotangents: dict[str, Any],
        pulled: PairOutputs,
        slopes: PairOutputs,
        outputs: PairOutputs,
        batch: ReferencedBatch,
        count: Float[Array, ""],
    ) -> Observation:
        """The observation from the probes' cotangents; rows are those of `batch`.

        Args:
          cotangents: of `probes`.
          pulled: what was pulled back to make them.
          slopes: derivatives of the batch's loss by its outputs.
          outputs: the forward pass's.
          batch: the pairs.
          count: what the sum of losses is divided by.
        """
        found = contributions(cotangents, self.objective.policy.config, *self._rows(batch))
        share = jnp.where(batch.pairs.weight > 0, batch.pairs.weight, jnp.nan) / count
        by = pulled.policy
        geometry = unweighted(total(found), by)
        weights = Coefficients(
            chosen=-slopes.policy[:, 0] / share, rejected=slopes.policy[:, 1] / share
        )
        return Observation(
            geometry=geometry,
            weights=weights if self.cure is None else self.cure(weights, geometry),
            log_probs=outputs.policy,
            preconditioned=None,
            parts={path: unweighted(x, by) for path, x in found.items()} if self.parts else {},
        )

    def reweighted(
        self, slopes: PairOutputs, seen: Observation, batch: ReferencedBatch, count: Any
    ) -> PairOutputs:
        """The derivatives by the outputs, with the observation's weights for those of the loss."""
        share = (batch.pairs.weight / count)[:, None]
        weights = jnp.stack([-seen.weights.chosen, seen.weights.rejected], axis=1)
        cured = jnp.where(share > 0, share * weights, 0.0)
        return dataclasses.replace(slopes, policy=cured)

    def preconditioned(
        self, trained: Params, frozen: Any, batch: ReferencedBatch, opt_state: Any
    ) -> PairGeometry | None:
        """The geometry in the inner product of the optimiser's update, if it is wanted.

        Two backward passes per pair, one pair after the other: an elementwise factor on gradients
        does not factor over tokens.
        """
        if self.preconditioner is None:
            return None
        diagonal = self.preconditioner(opt_state)

        def of_pair(pair: ReferencedBatch) -> tuple[Array, Array, Array]:
            one = jax.tree.map(lambda x: x[None], pair)

            def log_probs(trained: Params) -> Float[Array, " sides"]:
                return self.objective.forward(trained, frozen, one, None).policy[0]

            _, backward = jax.vjp(log_probs, trained)
            chosen, rejected = (backward(side)[0] for side in jnp.eye(2))
            return gram(chosen, rejected, diagonal)

        chosen, rejected, inner = jax.lax.map(of_pair, batch)
        return PairGeometry(chosen=chosen, rejected=rejected, inner=inner)

    def outputs_after(
        self, params: Params, frozen: Any, batch: ReferencedBatch, micro_batches: int
    ) -> PairOutputs | None:
        """The batch's outputs under updated parameters, if the realised changes are wanted."""
        if not self.realised:
            return None
        parts = split_micro_batches(batch, micro_batches)
        return join_micro_batches(
            jax.lax.map(lambda part: self.objective.forward(params, frozen, part, None), parts)
        )

    def metrics(
        self, seen: Observation, weight: Float[Array, " pairs"], after: PairOutputs | None
    ) -> dict[str, Mean]:
        """Means over the pairs where a number is defined."""
        values = summary(seen, None if after is None else after.policy)
        means = {}
        for name, value in values.items():
            rows = value.reshape(value.shape[0], -1)
            for layer in range(rows.shape[1]):
                own = rows[:, layer]
                label = name if value.ndim == 1 else f"{name}/{layer}"
                means[label] = mean_of(own, weight * jnp.isfinite(own))
        return means

    def _rows(self, batch: ReferencedBatch) -> tuple[Array, Array]:
        rows = batch.pairs.rows()
        return rows.tokens, rows.response_tokens
