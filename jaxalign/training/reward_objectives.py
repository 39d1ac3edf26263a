"""Objectives of reward models and pairwise preference models: losses of two scores per pair."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.data.batches import PairBatch
from jaxalign.losses import bradley_terry, preference_model
from jaxalign.models.score import SCORE, rewards
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.objectives import Params, Policy, wins

Values = dict[str, Float[Array, " pairs"]]


def reward_values(scores: Float[Array, "pairs 2"], **options: float) -> Values:
    """Values of each pair for a reward model, which scores one response per row.

    Args:
      scores: rewards of the chosen and of the rejected response.
      **options: of `losses.bradley_terry`.

    Returns:
      The loss, rewards and their margin under TRL's names, and the preference for the chosen
      response, each [pairs].
    """
    chosen, rejected = scores[:, 0], scores[:, 1]
    return {
        "loss": bradley_terry(chosen, rejected, **options),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": wins(chosen, rejected),
        "preferences/chosen": jax.nn.sigmoid(chosen - rejected),
    }


def comparison_values(scores: Float[Array, "pairs 2"]) -> Values:
    r"""Values of each pair for a preference model, which scores one comparison per row.

    A score is the log-odds of the first response. Training and prediction use both orders:

    .. math:: \ell = -\tfrac12 \log\sigma(z_{wl}) - \tfrac12 \log\sigma(-z_{lw}), \quad
              p(y_w \succ y_l) = \tfrac12 (\sigma(z_{wl}) + \sigma(-z_{lw}))

    Args:
      scores: z with the chosen response first, and with the rejected response first.

    Returns:
      The loss, the mean log-odds of the chosen response as the margin, whether it wins, its
      preference, and whether both orders have the same winner, each [pairs].

    References:
      Munos et al., 2023, arXiv:2312.00886; both orders: Guo et al., 2024, arXiv:2402.04792.
    """
    ones = jnp.ones_like(scores[:, 0])
    first, second = scores[:, 0], -scores[:, 1]
    preference = (jax.nn.sigmoid(first) + jax.nn.sigmoid(second)) / 2
    return {
        "loss": (preference_model(first, ones) + preference_model(second, ones)) / 2,
        "rewards/margins": (first + second) / 2,
        "rewards/accuracies": wins(preference, 1 - preference),
        "preferences/chosen": preference,
        "preferences/consistency": ((first > 0) == (second > 0)).astype(jnp.float32),
    }


VALUES: dict[str, Callable[..., Values]] = {
    "bradley_terry": reward_values,
    "preference_model": comparison_values,
}
"""Name of a reward loss -> function from scores to values of each pair."""


@dataclass(frozen=True, kw_only=True)
class ScoreObjective:
    """A loss of the scores of a batch's rows, two per pair.

    The trained parameters have the head under `SCORE`, beside the model's own or its adapters.
    """

    policy: Policy
    values: Callable[..., Values]
    """Scores [pairs, 2] -> values of each pair by name, including "loss"."""
    options: dict[str, Any]
    coupled: bool = False

    def count(self, batch: PairBatch) -> Float[Array, ""]:
        return jnp.sum(batch.weight)

    def forward(
        self, trained: Params, frozen: Any, batch: PairBatch, key: PRNGKeyArray | None
    ) -> Float[Array, "pairs 2"]:
        own = {name: tree for name, tree in trained.items() if name != SCORE}
        params = self.policy.policy_params(own, frozen["policy"], key)
        rows = batch.rows(shared_prefix=True)
        scores = rewards(
            {**params, SCORE: trained[SCORE]},
            self.policy.config,
            rows.tokens,
            rows.prompt_length + rows.response_length,
            shared_prefix=rows.shared_prefix,
            packed=rows.packed,
            compute=self.policy.compute,
        )
        return scores.reshape(-1, 2)

    def reduce(
        self, outputs: Float[Array, "pairs 2"], batch: PairBatch, count: Float[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        values, weight = self.values(outputs, **self.options), batch.weight
        metrics = {name: mean_of(value, weight) for name, value in values.items()}
        return jnp.sum(jnp.where(weight > 0, values["loss"], 0.0) * weight) / count, metrics
