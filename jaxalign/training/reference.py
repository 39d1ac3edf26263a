"""Reference log-probs of every training pair, computed once and kept in the run folder."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data.batches import PairBatch
from jaxalign.sharding import replicated
from jaxalign.sharding.processes import first_says
from jaxalign.training.objectives import PreferenceObjective
from jaxalign.training.step import on_mesh


def precompute_reference(
    objective: PreferenceObjective,
    params: Any,
    batches: Iterable[PairBatch],
    put: Callable[[Any], Any],
    path: Path,
    mesh: Mesh,
) -> np.ndarray:
    """Log-probs of chosen and rejected under the reference, by record number.

    Args:
      objective: its policy describes the model.
      params: the reference's parameters.
      batches: every training pair once; filler pairs have weight 0.
      put: host batch -> device batch.
      path: an .npz file; read where it exists (a resumed run), written where not.
      mesh: the devices that `put` spreads a batch over.

    Returns:
      [highest record number + 1, 2] in nats; NaN where no pair has that number.
    """
    if first_says(path.exists()):
        return np.load(path, allow_pickle=False)["log_probs"]

    @partial(jax.jit, out_shardings=replicated(mesh))  # every process keeps the whole table
    @partial(on_mesh, mesh=mesh)
    def log_probs(params: Any, batch: PairBatch) -> tuple[jax.Array, ...]:
        values = objective.policy.log_probs(batch, params).log_prob.sum(-1)
        return batch.weight, batch.record_index, values

    numbers, values = [], []
    for batch in batches:
        weight, number, value = map(np.asarray, log_probs(params, put(batch)))
        numbers.append(number[weight > 0])
        values.append(value[weight > 0])
    index = np.concatenate(numbers)
    table = np.full((index.max() + 1, 2), np.nan, np.float32)
    table[index] = np.concatenate(values)
    if jax.process_index() == 0:
        scratch = path.with_suffix(".partial.npz")
        np.savez(scratch, log_probs=table)
        scratch.replace(path)
    return table
