"""The gradient of a batch under the switches that act on gradients: calibration and logits-SAM."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.losses import BAND_START, NO_SWITCHES, Switches, update_band
from jaxalign.models.head import SHIFT, zero_shift
from jaxalign.training.gradients import PLAIN, Backward, plain_gradients
from jaxalign.training.metrics import Mean
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.objectives import (
    Objective,
    PairOutputs,
    Params,
    PreferenceObjective,
    ReferencedBatch,
)

TRAINED = "trained"
"""Key of the trained parameters among the frozen ones, where only the head is differentiated."""


def gradients(
    objective: Objective,
    trained: Params,
    frozen: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    micro_batches: int = 1,
    backward: Backward = PLAIN,
    running: Mapping[str, Array] | None = None,
) -> tuple[Params, dict[str, Mean], Any]:
    """`plain_gradients` under the switches of the objective, if it has any.

    Args:
      objective: what is minimised.
      trained: parameters.
      frozen: what the step reads and never changes.
      batch: the whole batch.
      key: of dropout.
      micro_batches: number of parts; they do not change the result.
      backward: backward pass of a part.
      running: running statistics before this batch.

    Returns:
      The gradient, the batch's metrics, and its statistics from `backward`.
    """
    options = {"micro_batches": micro_batches, "backward": backward, "running": running}
    switches = switches_of(objective)
    if switches.calibration == "none" and not switches.logits_sam:
        return plain_gradients(objective, trained, frozen, batch, key, **options)
    assert isinstance(objective, PreferenceObjective)
    batch = _with_reference(objective, frozen, batch, micro_batches)
    band: dict[str, Array] = {}
    if switches.calibration != "none":
        before = objective.running_start() if running is None else running
        band = calibration(objective, trained, frozen, batch, key, micro_batches, before)
        options["running"] = {**before, **band}
    take: Any = _at_shifted_head if switches.logits_sam else plain_gradients
    grads, metrics, seen = take(objective, trained, frozen, batch, key, **options)
    one = jnp.float32(1)
    metrics |= {f"statistics/{name}": Mean(total=x, count=one) for name, x in band.items()}
    return grads, metrics, seen


def switches_of(objective: Any) -> Switches:
    """The switches of an objective; most kinds have none."""
    return objective.switches if isinstance(objective, PreferenceObjective) else NO_SWITCHES


def _with_reference(
    objective: PreferenceObjective, frozen: Any, batch: ReferencedBatch, micro_batches: int
) -> ReferencedBatch:
    """The batch with the reference's log-probs, so that several passes compute them once."""
    if not objective.takes_stored_reference or batch.reference is not None:
        return batch
    parts = split_micro_batches(batch.pairs, micro_batches)
    of_part = lambda part: objective.of_reference(part, frozen["reference"])  # noqa: E731
    reference = join_micro_batches(jax.lax.map(of_part, parts))
    return dataclasses.replace(batch, reference=reference)


@dataclass(frozen=True, kw_only=True)
class HeadObjective:
    """An objective as a function of a shift of the output head; all parameters are fixed.

    `frozen` has the trained parameters under `TRAINED`.
    """

    objective: PreferenceObjective
    coupled: bool
    """As in the objective."""

    def count(self, batch: ReferencedBatch) -> Float[Array, ""]:
        return self.objective.count(batch)

    def forward(
        self, trained: Array, frozen: Any, batch: ReferencedBatch, key: PRNGKeyArray | None
    ) -> PairOutputs:
        return self.objective.forward(frozen[TRAINED], {**frozen, SHIFT: trained}, batch, key)

    def update_running(
        self, running: Mapping[str, Array], outputs: PairOutputs, batch: ReferencedBatch
    ) -> Mapping[str, Array]:
        return self.objective.update_running(running, outputs, batch)

    def reduce(
        self,
        outputs: PairOutputs,
        batch: ReferencedBatch,
        count: Float[Array, ""],
        running: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        return self.objective.reduce(outputs, batch, count, running)


def in_head(
    objective: PreferenceObjective, trained: Params, frozen: Mapping[str, Any]
) -> tuple[HeadObjective, Array, dict[str, Any]]:
    """The objective of the head alone, the shift at which to differentiate it, and `frozen`."""
    params = objective.policy.policy_params(trained, frozen["policy"])
    shift = zero_shift(params, objective.policy.config)
    head = HeadObjective(objective=objective, coupled=objective.coupled)
    return head, shift, {**frozen, TRAINED: trained}


def _at_shifted_head(
    objective: PreferenceObjective,
    trained: Params,
    frozen: Mapping[str, Any],
    batch: ReferencedBatch,
    key: PRNGKeyArray,
    *,
    micro_batches: int,
    backward: Backward,
    running: Mapping[str, Array] | None,
) -> tuple[Params, dict[str, Mean], Any]:
    r"""Logits-SAM: the loss's gradient where its own step in the output head leads uphill.

    .. math:: \nabla_\theta \ell \bigl(W + \rho \, g / \|g\|\bigr), \quad g = \nabla_W \ell

    g is that of the whole batch. The metrics are those at W, and the loss at the shifted head. A
    gradient that is 0 shifts nothing.

    References:
      arXiv:2603.18258; `src/alignment/sam_trainer.py` of the authors (not adaptive).
    """
    options = {"micro_batches": micro_batches, "running": running}
    head, zero, fixed = in_head(objective, trained, frozen)
    slope, metrics, _ = plain_gradients(cast(Objective, head), zero, fixed, batch, key, **options)
    norm = optax.tree.norm(slope)
    rho = objective.switches.logits_sam
    shift = slope * jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
    moved, own = {**frozen, SHIFT: shift}, cast(Objective, objective)
    grads, there, seen = plain_gradients(
        own, trained, moved, batch, key, backward=backward, **options
    )
    return grads, metrics | {"loss/shifted_head": there["loss"]}, seen


def calibration(
    objective: PreferenceObjective,
    trained: Params,
    frozen: Mapping[str, Any],
    batch: ReferencedBatch,
    key: PRNGKeyArray,
    micro_batches: int,
    running: Mapping[str, Array],
) -> dict[str, Array]:
    """The running statistics of `update_band` with a batch.

    Args:
      objective: its switches say which parameters the norms are of.
      trained: parameters.
      frozen: what the step reads and never changes.
      batch: the whole batch.
      key: of dropout.
      micro_batches: number of parts.
      running: all running statistics before this batch.
    """
    norms, outputs = side_norms(objective, trained, frozen, batch, key, micro_batches)
    return band_with(objective, norms, outputs, batch, running)


def side_norms(
    objective: PreferenceObjective,
    trained: Params,
    frozen: Mapping[str, Any],
    batch: ReferencedBatch,
    key: PRNGKeyArray,
    micro_batches: int = 1,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], PairOutputs]:
    """Norms of the gradients of the mean log-prob of chosen and of rejected, and the outputs.

    Log-probs are those that a loss sees: sums, or means over tokens. It costs a forward pass, and
    two backward passes through the head or the network.
    """
    count = objective.count(batch)
    of: tuple[Any, Any, Any] = objective, trained, frozen
    if objective.switches.calibration == "head":
        of = in_head(*of)
    forward, point, fixed = of[0].forward, of[1], of[2]

    def of_part(
        sums: tuple[Any, Any], inputs: tuple[ReferencedBatch, Any]
    ) -> tuple[tuple[Any, Any], PairOutputs]:
        part, key = inputs
        outputs, pull = jax.vjp(lambda p: forward(p, fixed, part, key), point)
        zeros, weight = jax.tree.map(jnp.zeros_like, outputs), part.pairs.weight[:, None] / count
        slope = weight * seen_per_sum(objective, part)
        sides = []
        for side, total in enumerate(sums):
            one = slope * (jnp.arange(2)[None] == side)
            pulled = pull(dataclasses.replace(zeros, policy_log_probs=one))[0]
            sides.append(jax.tree.map(jnp.add, total, pulled))
        return (sides[0], sides[1]), outputs

    zeros = jax.tree.map(jnp.zeros_like, point)
    if micro_batches == 1:
        sums, outputs = of_part((zeros, zeros), (batch, key))
    else:
        parts = split_micro_batches(batch, micro_batches), jax.random.split(key, micro_batches)
        sums, outputs = jax.lax.scan(of_part, (zeros, zeros), parts)
        outputs = join_micro_batches(outputs)
    return (optax.tree.norm(sums[0]), optax.tree.norm(sums[1])), outputs


def seen_per_sum(objective: PreferenceObjective, batch: ReferencedBatch) -> Float[Array, "pairs 2"]:
    """The derivative of what a loss sees of a response with respect to its log-prob."""
    lengths = jnp.maximum(batch.pairs.response_length, 1).astype(jnp.float32)
    return 1 / lengths if objective.switches.log_probs == "mean" else jnp.ones_like(lengths)


def band_with(
    objective: PreferenceObjective,
    norms: tuple[Float[Array, ""], Float[Array, ""]],
    outputs: PairOutputs,
    batch: ReferencedBatch,
    running: Mapping[str, Array],
) -> dict[str, Array]:
    """`calibration`, given the norms and the outputs of the whole batch."""
    own = {name: value for name, value in running.items() if name not in BAND_START}

    def loss(outputs: PairOutputs) -> Float[Array, ""]:
        updated = objective.update_running(own, outputs, batch)
        return objective.reduce(outputs, batch, objective.count(batch), updated)[0]

    output_gradients = jax.grad(loss)(outputs).policy_log_probs / seen_per_sum(objective, batch)
    before = {name: running[name] for name in BAND_START}
    return update_band(before, (-output_gradients[:, 0].sum(), output_gradients[:, 1].sum()), norms)
