"""A reference that follows the policy: synchronised every few steps, or an exponential average."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxalign.training.masking import HEAD
from jaxalign.training.objectives import Policy

Params = Any


@dataclass(frozen=True, kw_only=True)
class MovingReference:
    r"""Moves the reference towards the policy every few steps.

    .. math:: \theta_{ref} \leftarrow a \theta + (1 - a) \theta_{ref}
              \quad \text{after every } \tau \text{ steps}

    It is a part of the training state, so it is saved with it. With adapters (LoRA) it is a second
    set of adapters on the same weights, which only a rate of 1 keeps: the mean of two products is
    no product of the same rank.

    Attributes:
      policy: whose parameters it has.
      every: tau, number of steps between two moves.
      rate: a, in (0, 1]; 1 is TR-DPO's hard update. With tau = 1 and a small rate, the reference is
        an exponential average of the policy.

    References:
      TR-DPO: Gorbatovski et al., 2024, arXiv:2404.09656, equations 4 and 5.
    """

    policy: Policy
    every: int
    rate: float = 1.0

    def start(self, trained: Mapping[str, Any]) -> Params:
        """The reference before the first step, from the trained parameters; not a copy."""
        return {name: tree for name, tree in trained.items() if name != HEAD}

    def frozen(self, reference: Params, frozen: Mapping[str, Params]) -> dict[str, Params]:
        """The frozen parameters of a step, with the reference of its state."""
        parameters = self.policy.policy_params(reference, frozen["policy"])
        return {**frozen, "reference": parameters}

    def moved(
        self, reference: Mapping[str, Any], trained: Mapping[str, Any], step: Int[Array, ""]
    ) -> Params:
        """The reference after a step.

        Args:
          reference: before it.
          trained: parameters after it.
          step: number of updates made, this one included.
        """
        moves = step % self.every == 0

        def move(old: Array, new: Array) -> Array:
            mean = new if self.rate == 1.0 else self.rate * new + (1 - self.rate) * old
            return jnp.where(moves, mean.astype(old.dtype), old)

        return jax.tree.map(move, dict(reference), {name: trained[name] for name in reference})
