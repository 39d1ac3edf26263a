"""Per-pair gradient statistics of a training step, from probes in its backward pass."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.entanglement import Coefficients, PairGeometry
from jaxalign.entanglement.geometry import gram
from jaxalign.entanglement.observation import Observation, summary
from jaxalign.entanglement.probing import contributions, total, unweighted, zero_probes
from jaxalign.entanglement.reweighting import Reweighting
from jaxalign.errors import UserError
from jaxalign.losses import PairLogProbs
from jaxalign.models.probes import Spans, with_probes
from jaxalign.models.responses import pair_spans
from jaxalign.rows import ResponseRows
from jaxalign.training.gradients import RECORDS, Update
from jaxalign.training.ledger import ledger_entries, ledger_metrics
from jaxalign.training.masking import HEAD
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.objectives import PairOutputs, PreferenceObjective, ReferencedBatch

Params = Any


def can_rest(objective: PreferenceObjective) -> bool:
    """Whether a loss has pairs of which a coefficient is 0, as those of a hinge at rest.

    Args:
      objective: its loss is differentiated at 64 random pairs, whose log-probs are between -60
        and -1 nats.
    """
    rng = np.random.default_rng(0)
    log_probs = -rng.uniform(1.0, 60.0, (4, 64)).astype(np.float32)
    lengths = rng.integers(1, 33, (2, 64))

    def total(own: Float[Array, "2 pairs"]) -> Float[Array, ""]:
        pairs = objective.switches.seen(
            PairLogProbs(
                chosen=own[0],
                rejected=own[1],
                reference_chosen=jnp.asarray(log_probs[2]),
                reference_rejected=jnp.asarray(log_probs[3]),
                chosen_length=jnp.asarray(lengths[0]),
                rejected_length=jnp.asarray(lengths[1]),
            )
        )
        weight, running = jnp.ones(64), objective.running_start()
        taken = objective.statistics.of(pairs, weight, running)
        return objective.loss(pairs, **{**taken, **objective.options}).sum()

    with jax.ensure_compile_time_eval():  # while a step is traced
        return bool(jnp.any(jax.jit(jax.grad(total))(jnp.asarray(log_probs[:2])) == 0))


@dataclass(frozen=True, kw_only=True)
class PairProbe:
    """Per-pair gradient statistics of a step: `backward` of `train_step`.

    The statistics come from the same backward pass as the update. The update is that of a step
    without a probe, up to float error. A coefficient of 0 would hide a pair's gradients, so a loss
    that has such pairs (`can_rest`) takes a backward pass of its own for them.
    """

    objective: PreferenceObjective
    parts: bool = False
    """Whether the geometry is broken down by layer and by kind of matrix."""
    reweighting: Reweighting | None = None
    """New weights for the gradients of each pair (`entanglement.reweighting`), applied by a second
    backward pass; None: the loss's own."""
    realised: bool = False
    """Whether to recompute the batch's log-probs after the update."""
    preconditioner: Callable[[Any], Params] | None = None
    """Optimiser state after the update -> P of `preconditioned`, a tree like the parameters."""
    ledger: bool = False
    """Whether to split the realised changes of the batch's log-probs, and those of the held-out
    pairs in `frozen["held_out"]`, by where they came from (`training.ledger`)."""

    def __post_init__(self):
        experts = getattr(self.objective.policy.config, "experts", None)
        if self.ledger and experts is not None and experts.balance_weight:
            raise UserError(
                "ledger: it divides an update among pairs, and the load-balancing loss of "
                "experts belongs to none; set router_balance to 0"
            )

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
        output_gradients: Any,
    ) -> tuple[Params, dict[str, Mean], Observation]:
        """The gradient and the metrics of a part, and the statistics of its pairs."""
        del objective  # same as self.objective

        def forward(trained: Params, probes: dict[str, Any]) -> PairOutputs:
            return self.forward(trained, probes, frozen, part, key)

        outputs, backward = jax.vjp(forward, trained, self.probes(trained, frozen, part))
        metrics: dict[str, Mean] = {}
        if output_gradients is None:
            output_gradients, metrics = jax.grad(reduce, has_aux=True)(outputs, part)
        if self.reweighting is None and not can_rest(self.objective):
            grads, cotangents = backward(output_gradients)
            pulled = output_gradients
            observation = self.read(cotangents, pulled, output_gradients, outputs, part, count)
            return grads, metrics, observation
        real = part.pairs.weight > 0  # a copy has no tokens of its own in packed rows
        units = dataclasses.replace(
            jax.tree.map(jnp.zeros_like, output_gradients),
            policy_log_probs=jnp.ones_like(outputs.policy_log_probs) * real[:, None],
        )
        observation = self.read(backward(units)[1], units, output_gradients, outputs, part, count)
        pulled = output_gradients
        if self.reweighting is not None:
            pulled = self.reweighted(output_gradients, observation, part, count)
        return backward(pulled)[0], metrics, observation

    def after_update(
        self,
        statistics: Observation,
        update: Update,
        frozen: Any,
        batch: ReferencedBatch,
        micro_batches: int,
    ) -> dict[str, Any]:
        """Means over the pairs, including the statistics that need the update; the ledger."""
        in_update = self.preconditioned(update.before, frozen, batch, update.opt_state)
        observation = dataclasses.replace(statistics, preconditioned=in_update)
        outputs = self.outputs_after(update.after, frozen, batch, micro_batches)
        metrics: dict[str, Any] = self.metrics(observation, batch.pairs.weight, outputs)
        if self.ledger:
            entries = ledger_entries(
                self.objective, observation, update, frozen, batch, micro_batches
            )
            metrics |= ledger_metrics(entries) | {RECORDS: entries}
        return metrics

    def probes(self, trained: Params, frozen: Any, batch: ReferencedBatch) -> dict[str, Any]:
        """Zeros whose cotangents are read by `read`."""
        policy = self.objective.policy
        adapted = policy.adapter_scale is not None
        model = {name: tree for name, tree in trained.items() if name != HEAD}
        return zero_probes(
            frozen["policy"] if adapted else model,
            policy.config,
            self._rows(batch),
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
        watched = with_probes(trained, probes, self._spans(batch))
        batch = dataclasses.replace(batch, pairs=batch.pairs.apart())
        return self.objective.forward(watched, frozen, batch, key)

    def read(
        self,
        cotangents: dict[str, Any],
        pulled: PairOutputs,
        output_gradients: PairOutputs,
        outputs: PairOutputs,
        batch: ReferencedBatch,
        count: Float[Array, ""],
    ) -> Observation:
        """The observation from the probes' cotangents; rows are those of `batch`.

        Args:
          cotangents: of `probes`.
          pulled: the output cotangents from which they were computed.
          output_gradients: derivatives of the batch's loss with respect to its outputs.
          outputs: the forward pass's.
          batch: the pairs.
          count: weight of the whole batch.
        """
        config = self.objective.policy.config
        parts = contributions(cotangents, config, self._rows(batch), self._spans(batch))
        fraction = jnp.where(batch.pairs.weight > 0, batch.pairs.weight, jnp.nan) / count
        factors = pulled.policy_log_probs
        geometry = unweighted(total(parts), factors)
        weights = Coefficients(
            chosen=-output_gradients.policy_log_probs[:, 0] / fraction,
            rejected=output_gradients.policy_log_probs[:, 1] / fraction,
        )
        return Observation(
            geometry=geometry,
            weights=weights if self.reweighting is None else self.reweighting(weights, geometry),
            log_probs=outputs.policy_log_probs,
            preconditioned=None,
            parts={path: unweighted(x, factors) for path, x in parts.items()} if self.parts else {},
        )

    def reweighted(
        self,
        output_gradients: PairOutputs,
        observation: Observation,
        batch: ReferencedBatch,
        count: Any,
    ) -> PairOutputs:
        """The output gradients, with the weights of the observation in place of the loss's."""
        fraction = (batch.pairs.weight / count)[:, None]
        weights = jnp.stack([-observation.weights.chosen, observation.weights.rejected], axis=1)
        cotangents = jnp.where(fraction > 0, fraction * weights, 0.0)
        return dataclasses.replace(output_gradients, policy_log_probs=cotangents)

    def preconditioned(
        self, trained: Params, frozen: Any, batch: ReferencedBatch, opt_state: Any
    ) -> PairGeometry | None:
        """The geometry in the inner product of the optimiser's update; None: not configured.

        Two backward passes per pair, one pair after the other: an elementwise factor on gradients
        does not factor over tokens.
        """
        if self.preconditioner is None:
            return None
        diagonal = self.preconditioner(opt_state)

        def of_pair(pair: ReferencedBatch) -> tuple[Array, Array, Array]:
            one = jax.tree.map(lambda x: x[None], pair)

            def log_probs(trained: Params) -> Float[Array, " sides"]:
                return self.objective.forward(trained, frozen, one, None).policy_log_probs[0]

            _, backward = jax.vjp(log_probs, trained)
            chosen, rejected = (backward(side)[0] for side in jnp.eye(2))
            return gram(chosen, rejected, diagonal)

        unpacked = dataclasses.replace(batch.pairs, packed=None, packed_apart=None)
        alone = dataclasses.replace(batch, pairs=unpacked)
        chosen, rejected, inner = jax.lax.map(of_pair, alone)
        return PairGeometry(chosen=chosen, rejected=rejected, inner=inner)

    def outputs_after(
        self, params: Params, frozen: Any, batch: ReferencedBatch, micro_batches: int
    ) -> PairOutputs | None:
        """The batch's outputs under the updated parameters; None: not configured."""
        if not self.realised:
            return None
        parts = split_micro_batches(batch, micro_batches)
        return join_micro_batches(
            jax.lax.map(lambda part: self.objective.forward(params, frozen, part, None), parts)
        )

    def metrics(
        self, observation: Observation, weight: Float[Array, " pairs"], after: PairOutputs | None
    ) -> dict[str, Mean]:
        """Means over the pairs where a number is defined."""
        values = summary(observation, None if after is None else after.policy_log_probs)
        means = {}
        for name, value in values.items():
            rows = value.reshape(value.shape[0], -1)
            for layer in range(rows.shape[1]):
                own = rows[:, layer]
                label = name if value.ndim == 1 else f"{name}/{layer}"
                means[label] = mean_of(own, weight * jnp.isfinite(own))
        return means

    def _rows(self, batch: ReferencedBatch) -> ResponseRows:
        """The rows of the forward pass: packed apart, where the batch has such rows."""
        return batch.pairs.apart().rows(shared_prefix=True)

    def _spans(self, batch: ReferencedBatch) -> Spans | None:
        return pair_spans(self._rows(batch), batch.pairs.weight)
