"""The ledger of a training step: changes of its own pairs and of held-out ones, by cause."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from jaxalign.data.batches import PairBatch
from jaxalign.entanglement.ledger import (
    PARTS,
    Changes,
    TokenChanges,
    changes,
    own_changes,
    rate_along,
    token_changes,
)
from jaxalign.entanglement.observation import Observation
from jaxalign.entanglement.probing import SMALLEST
from jaxalign.records import AnyArray, record
from jaxalign.training.gradients import Update
from jaxalign.training.metrics import Mean, mean_of
from jaxalign.training.micro_batches import join_micro_batches, split_micro_batches
from jaxalign.training.objectives import PreferenceObjective, ReferencedBatch

BATCH, HELD_OUT = "batch", "held_out"
"""The pairs of an update, and the same held-out pairs in every update; the latter are also the key
of the held-out `PairBatch` in `frozen`."""
SIDES = ("chosen", "rejected")


@record
class Entries:
    """The ledger of some pairs in one update.

    Attributes:
      changes: of whole responses.
      tokens: of their tokens.
      weight: of the pairs; 0 for fillers.
    """

    changes: Changes
    tokens: TokenChanges
    weight: Float[AnyArray, " pairs"]


def ledger_entries(
    objective: PreferenceObjective,
    observation: Observation,
    update: Update,
    frozen: Any,
    batch: ReferencedBatch,
    micro_batches: int = 1,
) -> dict[str, Entries]:
    """The ledger of the batch, and of the held-out pairs if there are any.

    Log-probs of the batch are those of the step, with its dropout; held-out pairs have none.

    Args:
      objective: that the step minimised.
      observation: geometry and coefficients of the batch's pairs before the update.
      update: of the step.
      frozen: what the step reads; the held-out pairs are in it under `HELD_OUT`.
      batch: of the step.
      micro_batches: parts in which the batch is computed.
    """
    difference = jax.tree.map(jnp.subtract, update.after, update.before)
    rate = rate_along(difference, update.gradient)
    policy, pairs = objective.policy, batch.pairs

    def of_part(part: PairBatch, key: PRNGKeyArray | None) -> TokenChanges:
        def log_probs(trained: Any) -> Float[AnyArray, "pairs 2 response"]:
            params = policy.policy_params(trained, frozen["policy"], key)
            return policy.log_probs(part, params).log_prob

        return token_changes(log_probs, update.before, update.after, update.gradient, rate)

    def of_pairs(pairs: PairBatch, key: PRNGKeyArray | None) -> TokenChanges:
        if micro_batches == 1:
            return of_part(pairs, key)
        keys = None if key is None else jax.random.split(key, micro_batches)
        parts = split_micro_batches(pairs, micro_batches), keys
        return join_micro_batches(jax.lax.map(lambda part: of_part(*part), parts))

    tokens = of_pairs(pairs, update.key)
    fraction = pairs.weight / objective.count(batch)
    own = own_changes(observation.geometry, observation.weights, fraction, rate, smallest=SMALLEST)
    entries = {BATCH: Entries(changes=changes(tokens, own), tokens=tokens, weight=pairs.weight)}
    if (held_out := frozen.get(HELD_OUT)) is not None:
        tokens = of_pairs(held_out, None)
        entries[HELD_OUT] = Entries(changes=changes(tokens), tokens=tokens, weight=held_out.weight)
    return entries


def ledger_metrics(entries: Mapping[str, Entries]) -> dict[str, Mean]:
    """Means over the pairs, in nats, of every part of the changes of chosen and rejected.

    `entanglement/ledger/own_chosen` and so on, and under `entanglement/ledger/held_out/` without
    `own`. A response whose own part is not known (`probing.SMALLEST`) counts in none of them, so
    that the parts add up; `undefined` is the fraction of such pairs.
    """
    means = {}
    for name, one in entries.items():
        before = "entanglement/ledger/" + (f"{name}/" if name != BATCH else "")
        known = jnp.isfinite(one.changes.own)
        for side, label in enumerate(SIDES):
            for part in (*PARTS, "realised"):
                if part == "own" and name != BATCH:
                    continue
                values = getattr(one.changes, part)[:, side]
                weight = jnp.where(known[:, side], one.weight, 0.0)
                means[f"{before}{part}_{label}"] = mean_of(values, weight)
        if name == BATCH:
            undefined = jnp.any(~known, axis=1).astype(jnp.float32)
            means[f"{before}undefined"] = mean_of(undefined, one.weight)
    return means
