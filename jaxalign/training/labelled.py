"""The objective of labelled responses, and its held-out metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy.stats import rankdata

from jaxalign.data.batches import PairBatch
from jaxalign.data.labelled import LabelledBatch
from jaxalign.data.mixtures import BySource
from jaxalign.losses import LabelledLogProbs, Statistics, statistics_of
from jaxalign.records import record
from jaxalign.sharding import replicated, shard_batch
from jaxalign.training.calibration import reliability
from jaxalign.training.evaluation import each_source
from jaxalign.training.metrics import Mean, mean_of, to_floats
from jaxalign.training.objectives import ROUNDING, Params, Policy, reward_scale
from jaxalign.training.step import TrainState, on_mesh


@record
class LabelledOutputs:
    """Log-probs and entropy of labelled responses: all that a loss and its metrics read."""

    log_prob: Float[Array, " rows"]
    reference: Float[Array, " rows"]
    mismatched_log_ratio: Float[Array, " rows"]
    """NaN where the loss does not read it."""
    entropy: Float[Array, " rows"]


@dataclass(frozen=True, kw_only=True)
class LabelledObjective:
    """A loss of the policy's and the reference's log-probs of labelled responses.

    The batch statistics that the loss declares (`jaxalign.losses.Statistics`) are computed over the
    responses passed to `reduce`: a whole training batch, or the whole held-out set.
    """

    policy: Policy
    loss: Callable[..., Float[Array, " rows"]]
    options: dict[str, Any]
    coupled: bool = False

    @property
    def statistics(self) -> Statistics:
        """The batch statistics of the loss."""
        return statistics_of(self.loss) or Statistics()

    def count(self, batch: LabelledBatch) -> Float[Array, ""]:
        return jnp.sum(batch.responses.weight)

    def forward(
        self, trained: Params, frozen: Any, batch: LabelledBatch, key: PRNGKeyArray | None
    ) -> LabelledOutputs:
        with jax.named_scope("policy"):
            params = self.policy.policy_params(trained, frozen["policy"], key)
            of_policy = self.policy.log_probs(batch.responses, params)
        with jax.named_scope("reference"):
            reference = self.sums(batch.responses, frozen["reference"])
        mismatched = jnp.full(reference.shape, jnp.nan)
        if self.statistics.mismatched and batch.mismatched is not None:
            with jax.named_scope("mismatched"):
                fixed = jax.lax.stop_gradient(params)
                mismatched = self.sums(batch.mismatched, fixed)
                mismatched = mismatched - self.sums(batch.mismatched, frozen["reference"])
        tokens = jnp.maximum(batch.responses.response_length[:, 0], 1)
        return LabelledOutputs(
            log_prob=of_policy.log_prob[:, 0].sum(-1),
            reference=jax.lax.stop_gradient(reference),
            mismatched_log_ratio=jax.lax.stop_gradient(mismatched),
            entropy=jax.lax.stop_gradient(of_policy.entropy[:, 0].sum(-1) / tokens),
        )

    def sums(self, responses: PairBatch, params: Params) -> Float[Array, " rows"]:
        """Log-probs of responses, summed over their tokens, in nats."""
        return self.policy.log_probs(responses, params).log_prob[:, 0].sum(-1)

    def update_running(
        self, running: Mapping[str, Array], outputs: LabelledOutputs, batch: LabelledBatch
    ) -> Mapping[str, Array]:
        """The loss's running statistics, updated with a training batch."""
        if self.statistics.update is None:
            return running
        updated = self.statistics.update(
            running, self.as_labelled(outputs, batch), batch.responses.weight
        )
        return jax.lax.stop_gradient(updated)

    def reduce(
        self,
        outputs: LabelledOutputs,
        batch: LabelledBatch,
        count: Float[Array, ""],
        running: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The contribution of these responses to the mean loss, and their metrics.

        Args:
          outputs: of `forward`, for all responses from which the loss takes statistics.
          batch: the responses.
          count: weight of the whole batch.
          running: the loss's running statistics; in training, updated with this batch.
        """
        weight = batch.responses.weight
        responses = self.as_labelled(outputs, batch)
        running = {} if running is None else running
        taken = self.statistics.of(responses, weight, running)
        losses = self.loss(responses, **{**taken, **self.options})
        metrics = {"loss": mean_of(losses, weight), "entropy": mean_of(outputs.entropy, weight)}
        rewards = reward_scale(self.loss, self.options) * responses.log_ratio
        for side, labelled in (("chosen", responses.desirable), ("rejected", ~responses.desirable)):
            counted = weight * labelled.astype(weight.dtype)
            metrics[f"rewards/{side}"] = mean_of(rewards, counted)
            metrics[f"logps/{side}"] = mean_of(responses.log_prob, counted)
        for name, value in {**running, **taken}.items():
            if value.ndim == 0:
                metrics[f"statistics/{name}"] = Mean(total=value, count=jnp.float32(1))
        return jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight) / count, metrics

    def as_labelled(self, outputs: LabelledOutputs, batch: LabelledBatch) -> LabelledLogProbs:
        """The record that every loss of labelled responses reads."""
        return LabelledLogProbs(
            log_prob=outputs.log_prob,
            reference=outputs.reference,
            desirable=batch.desirable,
            length=batch.responses.response_length[:, 0],
            mismatched_log_ratio=outputs.mismatched_log_ratio,
        )


def evaluate_labelled(
    objective: LabelledObjective,
    batches: Sequence[LabelledBatch],
    mesh: Mesh,
    by_source: BySource | None = None,
) -> Callable[[TrainState, Any], dict[str, float]]:
    """(state, frozen) -> loss, rewards of both labels, AUC and calibration on held-out responses.

    `rewards/auc` is the probability that a desirable response has a larger reward than an
    undesirable one. `calibration/error` is the expected calibration error of the probability
    sigma(beta (r - shift)) that a response is desirable, where the shift is the loss's zero point,
    0 if it has none. Rewards within rounding error are 0. Batches do not change the numbers.

    Args:
      objective: of the stage.
      batches: held-out responses.
      mesh: of the devices.
      by_source: as in `evaluate_preferences`.
    """

    def forward(params: Params, frozen: Any, batch: LabelledBatch) -> LabelledOutputs:
        return objective.forward(params, frozen, batch, None)

    compiled = jax.jit(on_mesh(forward, mesh), out_shardings=replicated(mesh))
    reduce = jax.jit(lambda *arguments: objective.reduce(*arguments)[1])

    def run(state: TrainState, frozen: Any) -> dict[str, float]:
        parts = []
        for batch in batches:
            placed = shard_batch(batch, mesh)
            outputs = compiled(state.params, frozen, placed)
            rows = jax.device_get((outputs, _without_tokens(placed)))
            kept = rows[1].responses.weight > 0
            parts.append(jax.tree.map(lambda x, kept=kept: x[kept], rows))
        outputs, rows = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        order = np.argsort(rows.record_index, kind="stable")
        whole = jax.tree.map(lambda x: x[order], (outputs, rows))
        running = jax.device_get(state.running)
        scale = reward_scale(objective.loss, objective.options)

        def metrics_of(which: np.ndarray) -> dict[str, float]:
            outputs, rows = jax.tree.map(lambda x: x[which], whole)
            count = np.float32(rows.responses.weight.sum())
            metrics = to_floats(reduce(outputs, rows, count, running))
            known = [f"statistics/{name}" for name in SHIFTS if f"statistics/{name}" in metrics]
            shift = metrics[known[0]] if known else 0.0
            above = np.asarray(outputs.log_prob - outputs.reference - shift, np.float64)
            noise = ROUNDING * (np.abs(outputs.log_prob) + np.abs(outputs.reference))
            rewards = scale * np.where(np.abs(above) <= noise, 0.0, above)
            return metrics | separation(rewards, np.asarray(rows.desirable))

        return each_source(metrics_of, whole[1].record_index, by_source)

    return run


SHIFTS = ("kl", "mean_log_ratio")
"""Statistics that are subtracted from a log-ratio: the zero points of the losses."""


def separation(
    rewards: Float[np.ndarray, " rows"], desirable: Bool[np.ndarray, " rows"]
) -> dict[str, float]:
    r"""How well rewards tell desirable responses from others.

    .. math:: \text{AUC} = P(r_D > r_U) + \tfrac12 P(r_D = r_U)

    Args:
      rewards: after the shift; sigma of them is the probability that a response is desirable.
      desirable: the labels.

    Returns:
      `rewards/auc`, if there are both labels, `rewards/accuracies` (the sign of a reward is its
      label; 0 counts half) and `calibration/error`.
    """
    number = int(desirable.sum())
    probability = 1 / (1 + np.exp(-rewards))
    right = np.where(desirable, probability, 1 - probability)
    found = {
        "rewards/accuracies": float(np.where(rewards == 0, 0.5, (rewards > 0) == desirable).mean()),
        "calibration/error": reliability(right).error,
    }
    if 0 < number < len(rewards):
        ranks = rankdata(rewards)[desirable].sum() - number * (number + 1) / 2
        found["rewards/auc"] = float(ranks / (number * (len(rewards) - number)))
    return found


def _without_tokens(batch: LabelledBatch) -> LabelledBatch:
    """Labels, lengths, numbers and weights, which the loss and its metrics read."""
    rows = batch.responses
    return LabelledBatch(
        responses=PairBatch(
            tokens=rows.tokens[..., :0],
            prompt_length=rows.prompt_length,
            response_tokens=rows.response_tokens[..., :0],
            response_length=rows.response_length,
            record_index=rows.record_index,
            weight=rows.weight,
        ),
        mismatched=None,
        desirable=batch.desirable,
    )


def count_tokens(batch: LabelledBatch) -> Int[Array, ""]:
    """Tokens of prompts and responses without padding, those of mismatched rows included."""
    parts = [part for part in (batch.responses, batch.mismatched) if part is not None]
    return jnp.sum(jnp.stack([jnp.sum(x.prompt_length + x.response_length) for x in parts]))
