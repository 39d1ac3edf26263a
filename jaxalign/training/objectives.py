"""Objectives of training steps: log-probs of a batch under the policy, reduced by a pure loss."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.data.batches import PairBatch, TextBatch
from jaxalign.losses import (
    BAND_START,
    NO_SWITCHES,
    PairLogProbs,
    Statistics,
    Switches,
    TokenLogProbs,
    calibrated,
    importance_weights,
    members_of,
    options_by_member,
    statistics_of,
)
from jaxalign.models.compute import Compute
from jaxalign.models.experts import BALANCE, with_balance
from jaxalign.models.head import SHIFT, with_shift
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
    """The policy and its reference, given trained and frozen parameters.

    Without adapters the trained parameters are the policy's weights. With adapters (LoRA) the
    trained parameters are the adapters and the frozen ones the policy's weights; the reference is
    the same weights without the adapters, so there is no second copy.
    """

    config: Any
    """The model's architecture."""
    adapter_scale: float | None = None
    """alpha / rank of the adapters; None: all parameters are trained."""
    adapter_dropout: float = 0.0
    """Probability that an adapter's input feature is dropped in training."""
    weights: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """How the frozen weights below the adapters are stored."""
    remat: str = "none"
    dtype: Any = None
    """Computation dtype; None: that of the parameters."""
    attention: str = "auto"
    """Implementation of a decoder's attention."""

    @property
    def compute(self) -> Compute:
        """How forward passes are computed."""
        return Compute(remat=self.remat, dtype=self.dtype, attention=self.attention)

    def policy_params(
        self, trained: Params, frozen: Params, key: PRNGKeyArray | None = None
    ) -> Params:
        """The policy's parameters, with adapters where these are trained.

        Args:
          trained: all parameters, or the adapters; the probe of the experts' balance under
            `BALANCE`, if the backward pass adds the gradient of the load-balancing loss.
          frozen: the weights below the adapters.
          key: of the adapters' dropout; None: no dropout.
        """
        if BALANCE in trained:
            own = {name: tree for name, tree in trained.items() if name != BALANCE}
            return with_balance(self.policy_params(own, frozen, key), trained[BALANCE])
        if self.adapter_scale is None:
            return trained
        adapters = {name: tree for name, tree in trained.items() if name in frozen}  # no heads
        if self.adapter_dropout and key is not None:
            adapters = with_dropout(adapters, key, rate=self.adapter_dropout)
        return with_adapters(frozen, adapters, self.adapter_scale)

    def log_probs(
        self, batch: PairBatch, params: Params, *, collision: bool = False
    ) -> ResponseLogProbs:
        """Token log-probs [pairs, sides, response] of the responses, 0 at padding."""
        rows = batch.rows(shared_prefix=True)
        out = response_log_probs(
            params, self.config, rows, collision=collision, compute=self.compute
        )
        return jax.tree.map(lambda x: x.reshape(batch.response_tokens.shape), out)

    def compare(
        self,
        batch: PairBatch,
        params: Params,
        reference: Params,
        *,
        reverse: bool = False,
        collision: bool = False,
    ) -> ResponseComparison:
        """Policy and reference at every response token, [pairs, sides, response], 0 at padding."""
        options = {"reverse": reverse, "collision": collision, "compute": self.compute}
        rows = batch.rows(shared_prefix=True)
        out = compare_responses(params, reference, self.config, rows, **options)
        return jax.tree.map(lambda x: x.reshape(batch.response_tokens.shape), out)

    def text_log_probs(self, batch: TextBatch, params: Params) -> Array:
        """Token log-probs [rows, length], 0 where a token is not scored."""
        text = batch.tokens, batch.segment_ids, batch.positions, batch.target_mask
        return text_log_probs(params, self.config, *text, compute=self.compute)


def reward_scale(loss: PreferenceLoss, options: dict[str, Any]) -> float:
    """The factor on the log-ratio in the implicit reward: the loss's beta or tau, else 1.

    Of a mixture, that of its first member with one.
    """
    if members := members_of(loss):
        own = options_by_member(options, members)
        names = [name for name, one in members.items() if _has_scale(one)]
        return reward_scale(members[names[0]], own[names[0]]) if names else 1.0
    parameters = inspect.signature(loss).parameters
    for name in ("beta", "tau"):
        if name in parameters:
            return float(options.get(name, parameters[name].default))
    return 1.0


def _has_scale(loss: PreferenceLoss) -> bool:
    return not {"beta", "tau"}.isdisjoint(inspect.signature(loss).parameters)


# A log-prob is a sum over tokens, layers and widths. Programs that add in different orders have
# different rounding errors, each up to 2^-24 = 6e-8 of the sum, which add up like a random walk.
# For a model of 135M parameters, shared prefixes change margins by up to 7e-7 of their four
# log-probs, and single log-probs by 2.3e-6. 2^-18 = 4e-6 is 64 roundings: 8e-4 nats for a pair with
# 50 nats per response. bfloat16 is less accurate: there a tie may go either way.
ROUNDING = 2.0**-18
"""Differences of log-probs below this fraction of the log-probs count as rounding error."""


def wins(
    chosen: Float[Array, " pairs"],
    rejected: Float[Array, " pairs"],
    noise: Float[Array, " pairs"] | float = 0.0,
) -> Array:
    """1 where chosen has the larger value, 0 where rejected has; a tie is half a win.

    Args:
      chosen: values of the chosen responses.
      rejected: values of the rejected responses.
      noise: the largest difference that is a tie.
    """
    return jnp.where(jnp.abs(chosen - rejected) <= noise, 0.5, chosen > rejected)


def margin_noise(pairs: PairLogProbs) -> Float[Array, " pairs"]:
    """Rounding error of a pair's margin in nats: `ROUNDING` times its log-probs."""
    sides = pairs.chosen, pairs.rejected, pairs.reference_chosen, pairs.reference_rejected
    return ROUNDING * sum(map(jnp.abs, sides), jnp.zeros_like(pairs.chosen))


def pair_metrics(
    pairs: PairLogProbs,
    losses: Float[Array, " pairs"],
    weight: Float[Array, " pairs"],
    *,
    scale: float | None,
    whole: PairLogProbs | None = None,
) -> dict[str, Mean]:
    """The usual metrics of a batch of pairs, under TRL's names.

    Args:
      pairs: log-probs as the loss sees them.
      losses: of the pairs.
      weight: of the pairs.
      scale: of the log-ratios in the rewards; None: there is no reference, so no rewards.
      whole: log-probs of whole responses, for `logps/...`; None: `pairs`.
    """
    whole = pairs if whole is None else whole
    values = {"loss": losses}
    if scale is not None:
        chosen, rejected = scale * pairs.chosen_log_ratio, scale * pairs.rejected_log_ratio
        # scores grow with log-ratios, whose rounding is known
        ratios = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
        values |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": wins(*ratios, margin_noise(pairs)),
        }
    values |= {
        "logps/chosen": whole.chosen,
        "logps/rejected": whole.rejected,
        "logps/accuracies": wins(whole.chosen, whole.rejected),
        "logps/mean_accuracies": wins(whole.chosen_mean, whole.rejected_mean),
    }
    return {name: mean_of(value, weight) for name, value in values.items()}


@record
class ReferencedBatch:
    """A batch of pairs, with its log-probs under the reference if they were precomputed."""

    pairs: PairBatch
    reference: Float[AnyArray, "pairs 2"] | None


@record
class PairOutputs:
    """Log-probs and entropy of a batch of pairs: all that a loss and its metrics read.

    The reference's log-probs are NaN if the objective has no reference.

    Attributes:
      whole: the policy's log-probs of whole responses, where those of the loss are of some tokens
        or weigh them; None: the same.
      importance: factor on the loss of each pair; None: 1.
    """

    policy_log_probs: Float[Array, "pairs 2"]
    reference_log_probs: Float[Array, "pairs 2"]
    entropy: Float[Array, " pairs"]
    whole: Float[Array, "pairs 2"] | None = None
    importance: Float[Array, " pairs"] | None = None


@runtime_checkable
class Objective(Protocol):
    """Separate forward pass and reduction of a batch, so that micro-batches add up exactly."""

    coupled: bool
    """Whether a row's loss depends on the other rows of its batch."""

    def count(self, batch: Batch) -> Float[Array, ""]:
        """The weight of a whole batch, by which the sum of losses is divided."""
        ...

    def forward(self, trained: Params, frozen: Any, batch: Batch, key: PRNGKeyArray | None) -> Any:
        """Outputs whose leaves have the batch's rows as their first axis."""
        ...

    def reduce(
        self, outputs: Any, batch: Batch, count: Float[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The contribution of these rows to the mean loss, and their metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """A preference loss of the policy's and the reference's log-probs of chosen and rejected.

    The batch statistics that the loss declares (`jaxalign.losses.Statistics`) are computed over the
    pairs passed to `reduce`: a whole training batch, or the whole held-out set.
    """

    policy: Policy
    loss: PreferenceLoss
    options: dict[str, Any]
    coupled: bool = False
    has_reference: bool = True
    """Whether the loss or the metrics read reference log-probs; if not, none are computed."""
    switches: Switches = NO_SWITCHES
    """What is done to the log-probs before the loss."""

    @property
    def statistics(self) -> Statistics:
        """The batch statistics of the loss."""
        return statistics_of(self.loss) or Statistics()

    @property
    def start(self) -> dict[str, float]:
        """The running statistics of the loss and of its calibration, before the first step."""
        band = {} if self.switches.calibration == "none" else BAND_START
        return {**self.statistics.start, **band}

    def running_start(self) -> dict[str, Array]:
        """`start`, as arrays."""
        return {name: jnp.float32(value) for name, value in self.start.items()}

    @property
    def takes_stored_reference(self) -> bool:
        """Whether the reference's log-probs of whole responses are all that it reads of it."""
        return self.has_reference

    def update_running(
        self, running: Mapping[str, Array], outputs: PairOutputs, batch: ReferencedBatch
    ) -> Mapping[str, Array]:
        """The running statistics, those of the loss updated with a training batch."""
        if self.statistics.update is None:
            return running
        pairs = self.seen(outputs, batch.pairs)
        updated = self.statistics.update(dict(running), pairs, batch.pairs.weight)
        return jax.lax.stop_gradient({**running, **updated})

    def count(self, batch: ReferencedBatch) -> Float[Array, ""]:
        return jnp.sum(batch.pairs.weight)

    def seen(self, outputs: PairOutputs, batch: PairBatch) -> PairLogProbs:
        """The pairs as the loss sees them, after the switches."""
        pairs = as_pairs(outputs.policy_log_probs, outputs.reference_log_probs, batch)
        return self.switches.seen(pairs)

    def forward(
        self, trained: Params, frozen: Any, batch: ReferencedBatch, key: PRNGKeyArray | None
    ) -> PairOutputs:
        collision = self.switches.importance
        with jax.named_scope("policy"):
            params = self.policy_params(trained, frozen, key)
            of_policy = self.policy.log_probs(batch.pairs, params, collision=collision)
        reference = batch.reference
        if not self.has_reference:
            reference = jnp.full(batch.pairs.response_length.shape, jnp.nan)
        elif reference is None:
            with jax.named_scope("reference"):
                reference = self.of_reference(batch.pairs, frozen["reference"])
        return self._outputs(of_policy, reference, batch.pairs)

    def policy_params(
        self, trained: Params, frozen: Mapping[str, Any], key: PRNGKeyArray | None
    ) -> Params:
        """The policy's parameters, with the shift of its output head that logits-SAM adds."""
        params = self.policy.policy_params(trained, frozen["policy"], key)
        return with_shift(params, frozen[SHIFT]) if SHIFT in frozen else params

    def of_reference(self, batch: PairBatch, params: Params) -> Float[Array, "pairs 2"]:
        """The log-probs of responses under the reference, which may be stored."""
        log_prob = self.policy.log_probs(batch, params).log_prob
        return self.switches.total(log_prob, batch.response_length)

    def compare(
        self, trained: Params, frozen: Any, batch: ReferencedBatch
    ) -> tuple[PairOutputs, Float[Array, "pairs 2"]]:
        """The outputs of `forward` without dropout, and KL(policy || reference) of each response.

        The divergence is in nats, summed over the tokens of the response. Policy and reference each
        run once.
        """
        params = self.policy.policy_params(trained, frozen["policy"])
        pairs, collision = batch.pairs, self.switches.importance
        both = self.policy.compare(pairs, params, frozen["reference"], collision=collision)
        reference = self.switches.total(both.reference_log_prob, pairs.response_length)
        return self._outputs(both, reference, pairs), both.kl.sum(-1)

    def reduce(
        self,
        outputs: PairOutputs,
        batch: ReferencedBatch,
        count: Float[Array, ""],
        running: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The contribution of these pairs to the mean loss, and their metrics.

        Args:
          outputs: of `forward`, for all pairs from which the loss takes statistics.
          batch: the pairs.
          count: weight of the whole batch.
          running: the loss's running statistics; in training, updated with this batch.
        """
        running = {} if running is None else running
        if "log_a" in running:
            log_probs = calibrated(outputs.policy_log_probs, running["log_a"])
            outputs = dataclasses.replace(outputs, policy_log_probs=log_probs)
        weight, pairs = batch.pairs.weight, self.seen(outputs, batch.pairs)
        taken = self.statistics.of(pairs, weight, running)
        losses = self.loss(pairs, **{**taken, **self.options})
        if outputs.importance is not None:
            losses = losses * outputs.importance
        scale = reward_scale(self.loss, self.options) if self.has_reference else None
        whole = outputs.policy_log_probs if outputs.whole is None else outputs.whole
        whole = as_pairs(whole, outputs.reference_log_probs, batch.pairs)
        metrics = pair_metrics(pairs, losses, weight, scale=scale, whole=whole)
        if outputs.importance is not None:
            metrics["importance"] = mean_of(outputs.importance, weight)
        metrics["entropy"] = mean_of(outputs.entropy, weight)
        for name, value in {**running, **taken}.items():
            if value.ndim == 0:
                metrics[f"statistics/{name}"] = Mean(total=value, count=jnp.float32(1))
        return jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight) / count, metrics

    def _outputs(
        self,
        of_policy: ResponseLogProbs | ResponseComparison,
        reference: Float[Array, "pairs 2"],
        pairs: PairBatch,
    ) -> PairOutputs:
        """Sums over the tokens of each response."""
        log_prob, length = of_policy.log_prob, pairs.response_length
        tokens, total = jnp.maximum(length.sum(-1), 1), self.switches.total(log_prob, length)
        importance = None
        if of_policy.collision is not None:
            importance = importance_weights(log_prob, of_policy.collision, length)
        whole = None if self.switches.tail_weight == 1.0 else log_prob.sum(-1)
        return PairOutputs(
            policy_log_probs=total,
            reference_log_probs=jax.lax.stop_gradient(reference),
            entropy=jax.lax.stop_gradient(of_policy.entropy.sum((1, 2)) / tokens),
            whole=jax.lax.stop_gradient(whole),
            importance=importance,
        )


@dataclass(frozen=True, kw_only=True)
class TokenPreferenceObjective:
    """A preference loss that reads log-probs and divergences of single tokens (TDPO)."""

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
    """Mean negative log-prob per token, of responses or of packed text."""

    policy: Policy
    coupled: bool = False

    def _mask(self, batch: PairBatch | TextBatch) -> Float[Array, "rows *sides length"]:
        if isinstance(batch, TextBatch):
            return batch.target_mask * batch.weight[:, None]
        position = jnp.arange(batch.response_tokens.shape[-1])
        scored = position[None, None] < batch.response_length[..., None]
        return scored * batch.weight[:, None, None]

    def count(self, batch: PairBatch | TextBatch) -> Float[Array, ""]:
        return jnp.sum(self._mask(batch)).astype(jnp.float32)

    def forward(
        self,
        trained: Params,
        frozen: Any,
        batch: PairBatch | TextBatch,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "rows *sides length"]:
        params = self.policy.policy_params(trained, frozen["policy"], key)
        if isinstance(batch, TextBatch):
            return self.policy.text_log_probs(batch, params)
        return self.policy.log_probs(batch, params).log_prob

    def reduce(
        self,
        outputs: Float[Array, "rows *sides length"],
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
