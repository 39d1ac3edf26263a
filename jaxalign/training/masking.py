"""Preference losses of masked responses: log-probs summed over some of the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.entanglement.masks import differing_tokens, token_weights
from jaxalign.losses import importance_weights
from jaxalign.models.responses import response_states
from jaxalign.records import record
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.objectives import (
    PairOutputs,
    Params,
    PreferenceObjective,
    ReferencedBatch,
)

HEAD = "mask"
"""Key of a learned mask among the trained parameters."""


@record
class MaskedOutputs(PairOutputs):
    """Sums of token log-probs times the weights of the tokens.

    Attributes:
      kept: the sum of the weights.
    """

    kept: Float[Array, "pairs 2"]


@dataclass(frozen=True, kw_only=True)
class MaskedPreferenceObjective(PreferenceObjective):
    r"""Any preference loss of masked log-probs, with a penalty on the mask.

    .. math:: \ell\left(\sum_t \mu_{w,t} \log\pi_{w,t}, \; \sum_t \mu_{l,t} \log\pi_{l,t}\right)
              + \lambda (\|\mu_w\|_1 + \|\mu_l\|_1)

    The weights are learned if the trained parameters have a `HEAD`; else they are 1 at the tokens
    in which the responses differ. A loss that divides by lengths divides by those of the unmasked
    responses. Yuan et al., 2024, arXiv:2410.13828, section 5.2.
    """

    penalty: float = 0.0

    @property
    def takes_stored_reference(self) -> bool:
        """It reads the reference's log-probs of single tokens."""
        return False

    def forward(
        self, trained: Params, frozen: Any, batch: ReferencedBatch, key: PRNGKeyArray | None
    ) -> MaskedOutputs:
        pairs, reference, policy = batch.pairs, frozen["reference"], self.policy
        model = {name: tree for name, tree in trained.items() if name != HEAD}
        params = self.policy_params(model, frozen, key)
        collision = self.switches.importance
        of_policy = policy.log_probs(pairs, params, collision=collision)
        of_reference = jax.lax.stop_gradient(policy.log_probs(pairs, reference).log_prob)
        if HEAD in trained:
            rows = pairs.rows(shared_prefix=True)
            states = response_states(reference, policy.config, rows, compute=policy.compute)
            states = jax.lax.stop_gradient(states).reshape(*pairs.response_tokens.shape, -1)
            position = jnp.arange(pairs.response_tokens.shape[-1])
            real = position[None, None] < pairs.response_length[..., None]
            weights = token_weights(trained[HEAD], states, pairs.response_tokens)
            weights = jnp.where(real, weights, 0.0)
        else:
            weights = differing_tokens(pairs.response_tokens, pairs.response_length)
        length = pairs.response_length
        tokens, importance = jnp.maximum(length.sum(-1), 1), None
        if of_policy.collision is not None:
            importance = importance_weights(of_policy.log_prob, of_policy.collision, length)
        return MaskedOutputs(
            policy_log_probs=self.switches.total(weights * of_policy.log_prob, length),
            reference_log_probs=self.switches.total(weights * of_reference, length),
            importance=importance,
            entropy=jax.lax.stop_gradient(of_policy.entropy.sum((1, 2)) / tokens),
            kept=weights.sum(-1),
            whole=jax.lax.stop_gradient(of_policy.log_prob.sum(-1)),
        )

    def reduce(
        self,
        outputs: Any,
        batch: ReferencedBatch,
        count: Float[Array, ""],
        running: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        loss, metrics = super().reduce(outputs, batch, count, running)
        weight, lengths = batch.pairs.weight, jnp.maximum(batch.pairs.response_length, 1)
        fraction = outputs.kept / lengths
        for side, name in enumerate(("chosen", "rejected")):
            metrics[f"mask/{name}"] = mean_of(fraction[:, side], weight)
        penalty = self.penalty * jnp.sum(outputs.kept.sum(-1) * weight) / count
        return loss + penalty, metrics


def whole_responses(objective: Any) -> Any:
    """The objective without its mask, for held-out metrics of whole responses."""
    if not isinstance(objective, MaskedPreferenceObjective):
        return objective
    return PreferenceObjective(
        policy=objective.policy,
        loss=objective.loss,
        options=objective.options,
        coupled=objective.coupled,
        has_reference=objective.has_reference,
        switches=objective.switches,
    )
