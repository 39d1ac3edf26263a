"""The ledger of a single update of a model on some pairs, without a run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.data import PairBatch
from jaxalign.entanglement.pairs import ModelAndPairs
from jaxalign.losses import Loss
from jaxalign.progress import saying
from jaxalign.training.gradients import RECORDS
from jaxalign.training.ledger import BATCH, HELD_OUT, Entries
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import initial_state, train_step


def ledger_of_step(
    loaded: ModelAndPairs,
    reference: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    pairs: int,
) -> tuple[dict[str, Entries], dict[str, PairBatch]]:
    """Where the changes of log-probs come from in the first update of a model.

    Args:
      loaded: policy and pairs. The first `pairs` are the batch; as many after them, if there are
        any, are watched without being in it.
      reference: the reference model; it may be the policy.
      loss: of log-probs of pairs.
      optimizer: update rule, in its initial state.
      pairs: number of pairs in the batch.

    Returns:
      The ledger of the batch and of the other pairs, on the host; and these pairs.
    """
    model = loaded.model
    objective: Any = PreferenceObjective(
        policy=Policy(config=model.config),
        loss=loss.function,
        options={},
        coupled=loss.coupled,
    )
    batches = loaded.batches(pairs)[:2]
    placed = dict(zip((BATCH, HELD_OUT), jax.tree.map(jnp.asarray, batches), strict=False))
    batch = placed.pop(BATCH)
    frozen = {"policy": None, "reference": reference.params, **placed}

    def step(params: Any) -> Any:
        state = initial_state(params, optimizer, seed=0, running=objective.start)
        _, metrics = train_step(
            state,
            frozen,
            ReferencedBatch(pairs=batch, reference=None),
            objective=objective,
            optimizer=optimizer,
            backward=PairProbe(objective=objective, ledger=True),
        )
        return metrics[RECORDS]

    compiled = saying(
        jax.jit(step),
        lambda _: "a step and its ledger for {} pairs of {} x {} tokens".format(
            *batch.tokens.shape
        ),
    )
    entries = jax.device_get(compiled(model.params))
    return entries, dict(zip((BATCH, HELD_OUT), batches, strict=False))
