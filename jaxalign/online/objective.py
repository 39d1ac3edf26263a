"""Objective of an online step: log-probs of sampled responses, reduced by an algorithm's loss."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.data.batches import PairBatch
from jaxalign.losses import past_weights
from jaxalign.models.responses import response_log_probs_and_states
from jaxalign.models.score import SCORE
from jaxalign.online.algorithm import Algorithm
from jaxalign.online.rollouts import Rollout, RolloutBatch
from jaxalign.records import record
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.objectives import Params, Policy


@record
class RolloutOutputs:
    """Token log-probs, entropies and values of a rollout, 0 at padding."""

    log_prob: Float[Array, "prompts samples response"]
    reference: Float[Array, "prompts samples response"]
    entropy: Float[Array, "prompts samples response"]
    values: Float[Array, "prompts samples response"] | None


@dataclass(frozen=True, kw_only=True)
class OnlineObjective:
    """An algorithm's loss of the policy's and the reference's log-probs of sampled responses."""

    policy: Policy
    algorithm: Algorithm
    max_tokens: int = 0
    coupled: bool = False

    def count(self, batch: RolloutBatch) -> Float[Array, ""]:
        weight = batch.responses.weight
        if not self.algorithm.per_token:
            return jnp.sum(weight)
        tokens = batch.responses.response_length[:, : self.algorithm.trained].sum(-1)
        return jnp.maximum(jnp.sum(tokens * weight), 1)  # 0 if no group has a spread of rewards

    def forward(
        self, trained: Params, frozen: Any, batch: RolloutBatch, key: PRNGKeyArray | None
    ) -> RolloutOutputs:
        own = self.policy.policy_params(trained, frozen["policy"], key)
        responses = self.first(batch.responses)
        with jax.named_scope("policy"):
            out, values = self.log_probs_and_values(trained, responses, own)
        with jax.named_scope("reference"):
            of_reference = [frozen["reference"]]
            if "previous" in frozen:
                past = frozen["previous"], *frozen.get("older", ())
                of_reference = [self.policy.policy_params(x, frozen["policy"]) for x in past]
            scored = [self.log_probs_and_values(None, responses, x)[0] for x in of_reference]
            reference = scored[0].log_prob
            if len(scored) > 1:
                weights = past_weights(len(scored), self.algorithm.past_decay, frozen["begun"])
                logps = jnp.stack([x.log_prob for x in scored], axis=-1)
                reference = logps @ weights
            if (anchor := self.algorithm.anchor) > 0:
                known, _ = self.log_probs_and_values(None, responses, frozen["reference"])
                reference = (1 - anchor) * reference + anchor * known.log_prob
        return RolloutOutputs(
            log_prob=out.log_prob,
            reference=jax.lax.stop_gradient(reference),
            entropy=jax.lax.stop_gradient(out.entropy),
            values=values,
        )

    def first(self, responses: PairBatch) -> PairBatch:
        """The responses that the loss reads, which come first."""
        number = self.algorithm.trained
        return PairBatch(
            tokens=responses.tokens[:, :number],
            prompt_length=responses.prompt_length[:, :number],
            response_tokens=responses.response_tokens[:, :number],
            response_length=responses.response_length[:, :number],
            record_index=responses.record_index,
            weight=responses.weight,
            joint_tokens=responses.joint_tokens,  # of these responses alone, as the next two
            common_length=responses.common_length,
            packed=responses.packed,
        )

    def log_probs_and_values(
        self, trained: Params | None, responses: PairBatch, params: Params
    ) -> tuple[Any, Array | None]:
        """Token log-probs and entropies [prompts, samples, response]; the critic's values, if any.

        Args:
          trained: where the head of the critic lies; None: no values are wanted.
          responses: what is scored.
          params: of the policy, with adapters where it has them.
        """
        out, hidden = response_log_probs_and_states(
            params,
            self.policy.config,
            responses.rows(shared_prefix=True),
            compute=self.policy.compute,
        )
        shape = responses.response_tokens.shape
        values = None
        if self.algorithm.has_critic and trained is not None:
            kernel = trained[SCORE]["kernel"].astype(jnp.float32)
            values = (hidden.astype(jnp.float32) @ kernel).reshape(shape)
        return jax.tree.map(lambda x: x.reshape(shape), out), values

    def reduce(
        self, outputs: RolloutOutputs, batch: RolloutBatch, count: Float[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        lengths = batch.responses.response_length[:, : self.algorithm.trained]
        positions = jnp.arange(outputs.log_prob.shape[-1])
        rollout = Rollout(
            log_prob=outputs.log_prob,
            reference=outputs.reference,
            mask=positions[None, None] < lengths[..., None],
            values=outputs.values,
            batch=batch,
            max_tokens=self.max_tokens,
        )
        weight, losses = batch.responses.weight, self.algorithm.loss(rollout)
        total = jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight)
        tokens = jnp.maximum(lengths.sum(-1), 1)
        ratio = (outputs.log_prob - outputs.reference).sum(-1)
        metrics = {
            "log_ratio": ratio.mean(-1),
            "entropy": outputs.entropy.sum((1, 2)) / tokens,
        }
        if lengths.shape[1] > 1:
            metrics["margin"] = ratio[:, 0] - ratio[:, 1]
            metrics["margin_squared"] = jnp.square(metrics["margin"])
        means = {name: mean_of(value, weight) for name, value in metrics.items()}
        return total / count, {"loss": Mean(total=total, count=count)} | means
