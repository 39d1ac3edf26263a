"""What a step minimises: log-probs of a batch under the policy, reduced by a pure loss."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.data.batches import PairBatch, TextBatch
from jaxalign.losses import PairLogProbs, Statistics, TokenLogProbs, statistics_of
from jaxalign.models.compute import Compute
from jaxalign.models.lora import with_adapters, with_dropout
from jaxalign.models.responses import (
    ResponseComparison,
    ResponseLogProbs,
    compare_responses,
    response_log_probs,
    text_log_probs,
)
from jaxalign.records import AnyArray, record
from jaxalign.training.metrics import Mean, mean_of

Params = Any
Batch = Any
PreferenceLoss = Callable[..., Float[Array, " pairs"]]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the trained and the frozen parameters make up the policy and its reference.

    Without adapters the trained parameters are the policy's own. With adapters (LoRA) the trained
    parameters are the adapters, the frozen ones the policy's weights, and the reference is the
    same weights with the adapters off: no second copy.
    """

    config: Any
    """The model's architecture."""
    adapter_scale: float | None = None
    """alpha / rank of the adapters; None: all parameters are trained."""
    adapter_dropout: float = 0.0
    """Probability that an adapter's input feature is dropped in training."""
    remat: str = "none"
    dtype: Any = None
    """Computation dtype; None: that of the parameters."""

    @property
    def compute(self) -> Compute:
        """How forward passes are computed."""
        return Compute(remat=self.remat, dtype=self.dtype)

    def policy_params(
        self, trained: Params, frozen: Params, key: PRNGKeyArray | None = None
    ) -> Params:
        """The policy's parameters, with adapters where these are trained.

        Args:
          trained: all parameters, or the adapters.
          frozen: the weights below the adapters.
          key: of the adapters' dropout; None: no dropout.
        """
        if self.adapter_scale is None:
            return trained
        adapters = {name: tree for name, tree in trained.items() if name in frozen}  # no heads
        if self.adapter_dropout and key is not None:
            adapters = with_dropout(adapters, key, rate=self.adapter_dropout)
        return with_adapters(frozen, adapters, self.adapter_scale)

    def log_probs(self, batch: PairBatch, params: Params) -> ResponseLogProbs:
        """Token log-probs [pairs, 2, response] of chosen and rejected, 0 at padding."""
        rows = batch.rows(shared_prefix=True)
        out = response_log_probs(params, self.config, rows, compute=self.compute)
        return jax.tree.map(lambda x: x.reshape(batch.response_tokens.shape), out)

    def compare(
        self, batch: PairBatch, params: Params, reference: Params, *, reverse: bool = False
    ) -> ResponseComparison:
        """Policy and reference at every response token, [pairs, 2, response], 0 at padding."""
        rows = batch.rows(shared_prefix=True)
        out = compare_responses(
            params, reference, self.config, rows, reverse=reverse, compute=self.compute
        )
        return jax.tree.map(lambda x: x.reshape(batch.response_tokens.shape), out)

    def text_log_probs(self, batch: TextBatch, params: Params) -> Array:
        """Token log-probs [rows, length], 0 where a token is not scored."""
        text = batch.tokens, batch.segment_ids, batch.positions, batch.target_mask
        return text_log_probs(params, self.config, *text, compute=self.compute)


def reward_scale(loss: PreferenceLoss, options: dict[str, Any]) -> float:
    """The factor of the log-ratio in the implicit reward: the loss's beta or tau, else 1."""
    parameters = inspect.signature(loss).parameters
    for name in ("beta", "tau"):
        if name in parameters:
            return float(options.get(name, parameters[name].default))
    return 1.0


# A log-prob sums over tokens, layers and widths; two programs that add in other orders differ by
# the roundings on the way, each up to 2^-24 = 6e-8 of what is summed, like a random walk. A model
# of 135 million parameters, its pairs two in a row against row by row: margins off by up to 7e-7 of
# their four log-probs, single log-probs by 2.3e-6. 2^-18 is 64 roundings, 4e-6: for a pair of 50
# nats a side 8e-4 nats. bfloat16 is rougher, and there a draw may go either way.
ROUNDING = 2.0**-18
"""Share of the log-probs that a difference of theirs has to exceed to mean anything."""


def wins(
    chosen: Float[Array, " pairs"],
    rejected: Float[Array, " pairs"],
    noise: Float[Array, " pairs"] | float = 0.0,
) -> Array:
    """1 where chosen is ahead, 0 where rejected is; a draw is half a win.

    Args:
      chosen: values of the chosen responses.
      rejected: of the rejected ones.
      noise: the largest difference that is still a draw.
    """
    return jnp.where(jnp.abs(chosen - rejected) <= noise, 0.5, chosen > rejected)


def margin_noise(pairs: PairLogProbs) -> Float[Array, " pairs"]:
    """How far rounding alone may move a pair's margin, in nats: `ROUNDING` of its log-probs."""
    sides = pairs.chosen, pairs.rejected, pairs.reference_chosen, pairs.reference_rejected
    return ROUNDING * sum(map(jnp.abs, sides), jnp.zeros_like(pairs.chosen))


def pair_metrics(
    pairs: PairLogProbs,
    losses: Float[Array, " pairs"],
    weight: Float[Array, " pairs"],
    *,
    scale: float | None,
) -> dict[str, Mean]:
    """The usual numbers of a batch of pairs, under TRL's names.

    Args:
      pairs: log-probs.
      losses: of the pairs.
      weight: of the pairs.
      scale: of the log-ratios in the rewards; None: no reference is known, and no rewards.
    """
    values = {"loss": losses}
    if scale is not None:
        chosen = scale * (pairs.chosen - pairs.reference_chosen)
        rejected = scale * (pairs.rejected - pairs.reference_rejected)
        values |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": wins(chosen, rejected, abs(scale) * margin_noise(pairs)),
        }
    values |= {
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "logps/accuracies": wins(pairs.chosen, pairs.rejected),
        "logps/mean_accuracies": wins(pairs.chosen_mean, pairs.rejected_mean),
    }
    return {name: mean_of(value, weight) for name, value in values.items()}


@record
class ReferencedBatch:
    """A batch of pairs with its log-probs under the reference, where they are known already."""

    pairs: PairBatch
    reference: Float[AnyArray, "pairs 2"] | None


@record
class PairOutputs:
    """What the networks say of a batch of pairs: all that a loss and its metrics read.

    The reference's log-probs are NaN where the objective has no reference.
    """

    policy: Float[Array, "pairs 2"]
    reference: Float[Array, "pairs 2"]
    entropy: Float[Array, " pairs"]


@runtime_checkable
class Objective(Protocol):
    """Forward pass and reduction of a batch, apart, so that micro-batches add up exactly."""

    coupled: bool
    """Whether a row's loss depends on the other rows of its batch."""

    def count(self, batch: Batch) -> Float[Array, ""]:
        """What the sum of losses is divided by: weight of the whole batch."""
        ...

    def forward(self, trained: Params, frozen: Any, batch: Batch, key: PRNGKeyArray | None) -> Any:
        """Outputs whose leaves have the batch's rows as first axis."""
        ...

    def reduce(
        self, outputs: Any, batch: Batch, count: Float[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The batch's share of the loss, and its metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """A preference loss of the policy's and the reference's log-probs of chosen and rejected.

    What the loss declares to take from its batch (`jaxalign.losses.Statistics`) is computed over
    the pairs that `reduce` is given: all of a training batch, or the whole held-out set.
    """

    policy: Policy
    loss: PreferenceLoss
    options: dict[str, Any]
    coupled: bool = False
    has_reference: bool = True
    """Off: neither loss nor metrics read reference log-probs, and none are computed."""

    @property
    def statistics(self) -> Statistics:
        """What the loss takes from its batch."""
        return statistics_of(self.loss) or Statistics()

    def update_running(
        self, running: Mapping[str, Array], outputs: PairOutputs, batch: ReferencedBatch
    ) -> Mapping[str, Array]:
        """The loss's running statistics with a training batch."""
        if self.statistics.update is None:
            return running
        pairs = as_pairs(outputs.policy, outputs.reference, batch.pairs)
        updated = self.statistics.update(running, pairs, batch.pairs.weight)
        return jax.lax.stop_gradient(updated)

    def count(self, batch: ReferencedBatch) -> Float[Array, ""]:
        return jnp.sum(batch.pairs.weight)

    def forward(
        self, trained: Params, frozen: Any, batch: ReferencedBatch, key: PRNGKeyArray | None
    ) -> PairOutputs:
        with jax.named_scope("policy"):
            params = self.policy.policy_params(trained, frozen["policy"], key)
            of_policy = self.policy.log_probs(batch.pairs, params)
        reference = batch.reference
        if not self.has_reference:
            reference = jnp.full(batch.pairs.response_length.shape, jnp.nan)
        elif reference is None:
            with jax.named_scope("reference"):
                reference = self.policy.log_probs(batch.pairs, frozen["reference"])
            reference = reference.log_prob.sum(-1)
        return _outputs(of_policy, reference, batch.pairs)

    def compare(
        self, trained: Params, frozen: Any, batch: ReferencedBatch
    ) -> tuple[PairOutputs, Float[Array, "pairs 2"]]:
        """The outputs of `forward` without dropout, and KL(policy || reference) of each response.

        The divergence is in nats, summed over the tokens of the response. Policy and reference run
        once.
        """
        params = self.policy.policy_params(trained, frozen["policy"])
        both = self.policy.compare(batch.pairs, params, frozen["reference"])
        return _outputs(both, both.reference_log_prob.sum(-1), batch.pairs), both.kl.sum(-1)

    def reduce(
        self,
        outputs: PairOutputs,
        batch: ReferencedBatch,
        count: Float[Array, ""],
        running: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The batch's share of the loss, and its metrics.

        Args:
          outputs: of `forward`, for all pairs from which the loss takes statistics.
          batch: the pairs.
          count: weight of the whole batch.
          running: the loss's running statistics, with this batch in training.
        """
        pairs, weight = as_pairs(outputs.policy, outputs.reference, batch.pairs), batch.pairs.weight
        running = {} if running is None else running
        taken = self.statistics.of(pairs, weight, running)
        losses = self.loss(pairs, **{**taken, **self.options})
        scale = reward_scale(self.loss, self.options) if self.has_reference else None
        metrics = pair_metrics(pairs, losses, weight, scale=scale)
        metrics["entropy"] = mean_of(outputs.entropy, weight)
        for name, value in {**running, **taken}.items():
            if value.ndim == 0:
                metrics[f"statistics/{name}"] = Mean(total=value, count=jnp.float32(1))
        return jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight) / count, metrics


def _outputs(of_policy: Any, reference: Float[Array, "pairs 2"], pairs: PairBatch) -> PairOutputs:
    """Sums over the tokens of each response."""
    tokens = jnp.maximum(pairs.response_length.sum(-1), 1)
    return PairOutputs(
        policy=of_policy.log_prob.sum(-1),
        reference=jax.lax.stop_gradient(reference),
        entropy=jax.lax.stop_gradient(of_policy.entropy.sum((1, 2)) / tokens),
    )


@dataclass(frozen=True, kw_only=True)
class TokenPreferenceObjective:
    """A preference loss that reads every token: log-probs and divergences (TDPO)."""

    policy: Policy
    loss: PreferenceLoss
    options: dict[str, Any]
    coupled: bool = False

    def count(self, batch: ReferencedBatch) -> Float[Array, ""]:
        return jnp.sum(batch.pairs.weight)

    def forward(
        self, trained: Params, frozen: Any, batch: ReferencedBatch, key: PRNGKeyArray | None
    ) -> ResponseComparison:
        params = self.policy.policy_params(trained, frozen["policy"], key)
        return self.policy.compare(batch.pairs, params, frozen["reference"], reverse=True)

    def reduce(
        self, outputs: ResponseComparison, batch: ReferencedBatch, count: Float[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        weight = batch.pairs.weight
        lengths = batch.pairs.response_length
        real = jnp.arange(outputs.log_prob.shape[-1])[None, None] < lengths[..., None]
        names = {"log_prob": "{}", "reference_log_prob": "reference_{}", "kl": "{}_kl"}
        sides = {
            name.format(side): getattr(outputs, field)[:, at]
            for field, name in names.items()
            for at, side in enumerate(("chosen", "rejected"))
        }
        tokens = TokenLogProbs(**sides, chosen_mask=real[:, 0], rejected_mask=real[:, 1])
        losses = self.loss(tokens, **self.options)
        pairs = as_pairs(outputs.log_prob.sum(-1), outputs.reference_log_prob.sum(-1), batch.pairs)
        scale = reward_scale(self.loss, self.options)
        metrics = pair_metrics(pairs, losses, weight, scale=scale)
        return jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight) / count, metrics


@dataclass(frozen=True, kw_only=True)
class SupervisedObjective:
    """Minus the mean log-prob of a token: of the chosen responses, or of packed text."""

    policy: Policy
    coupled: bool = False

    def _mask(self, batch: PairBatch | TextBatch) -> Float[Array, "rows length"]:
        if isinstance(batch, TextBatch):
            return batch.target_mask * batch.weight[:, None]
        position = jnp.arange(batch.response_tokens.shape[-1])
        scored = position[None] < batch.response_length[:, :1]
        return scored * batch.weight[:, None]

    def count(self, batch: PairBatch | TextBatch) -> Float[Array, ""]:
        return jnp.sum(self._mask(batch)).astype(jnp.float32)

    def forward(
        self,
        trained: Params,
        frozen: Any,
        batch: PairBatch | TextBatch,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "rows length"]:
        params = self.policy.policy_params(trained, frozen["policy"], key)
        if isinstance(batch, TextBatch):
            return self.policy.text_log_probs(batch, params)
        chosen = PairBatch(
            tokens=batch.tokens[:, :1],
            prompt_length=batch.prompt_length[:, :1],
            response_tokens=batch.response_tokens[:, :1],
            response_length=batch.response_length[:, :1],
            record_index=batch.record_index,
            weight=batch.weight,
        )
        return self.policy.log_probs(chosen, params).log_prob[:, 0]

    def reduce(
        self,
        outputs: Float[Array, "rows length"],
        batch: PairBatch | TextBatch,
        count: Float[Array, ""],
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        mask = self._mask(batch)
        total = -jnp.sum(outputs * mask)
        tokens = jnp.sum(mask).astype(jnp.float32)
        return total / count, {"loss": Mean(total=total, count=tokens)}


def as_pairs(
    policy: Float[Array, "pairs 2"], reference: Float[Array, "pairs 2"], batch: PairBatch
) -> PairLogProbs:
    """The record that every preference loss reads."""
    return PairLogProbs(
        chosen=policy[:, 0],
        rejected=policy[:, 1],
        reference_chosen=reference[:, 0],
        reference_rejected=reference[:, 1],
        chosen_length=batch.response_length[:, 0],
        rejected_length=batch.response_length[:, 1],
    )
