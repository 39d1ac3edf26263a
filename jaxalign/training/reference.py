"""Reference log-probs of every training pair, computed once and stored in the run folder."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxalign.data.batches import PairBatch
from jaxalign.errors import notice
from jaxalign.files import read_arrays, write_arrays
from jaxalign.progress import Progress
from jaxalign.sharding import replicated
from jaxalign.sharding.processes import broadcast_flag
from jaxalign.training.objectives import PreferenceObjective
from jaxalign.training.step import on_mesh


def precompute_reference(
    objective: PreferenceObjective,
    params: Any,
    batches: Iterable[PairBatch],
    put: Callable[[Any], Any],
    path: Path,
    mesh: Mesh,
    fingerprint: str,
    *,
    records: Int[np.ndarray, " pairs"],
) -> np.ndarray:
    """Log-probs of chosen and rejected under the reference, by record number.

    Args:
      objective: with a policy of the same architecture.
      params: the reference's parameters.
      batches: every training pair once, of one size; filler pairs have weight 0.
      put: host batch -> device batch.
      path: an .npz file; read if it has these pairs (in a resumed run), else written.
      mesh: the devices of `put`.
      fingerprint: of the data and weights.
      records: record numbers of all training pairs.

    Returns:
      [largest record number + 1, 2] in nats; NaN where no pair has that number.
    """
    stored = _stored(path, records, fingerprint) if jax.process_index() == 0 else None
    if broadcast_flag(stored is not None):
        return np.load(path, allow_pickle=False)["log_probs"] if stored is None else stored

    @partial(jax.jit, out_shardings=replicated(mesh))  # every process keeps the whole table
    @partial(on_mesh, mesh=mesh)
    def log_probs(params: Any, batch: PairBatch) -> tuple[jax.Array, ...]:
        return batch.weight, batch.record_index, objective.of_reference(batch, params)

    table = np.full((records.max() + 1, 2), np.nan, np.float32)
    with Progress("reference log-probs", len(records), unit="pair") as progress:
        done = 0
        for batch in batches:
            weight, number, value = map(np.asarray, log_probs(params, put(batch)))
            table[number[weight > 0]] = value[weight > 0]
            done += int((weight > 0).sum())
            progress(done)
    if jax.process_index() == 0:
        write_arrays(path, log_probs=table, fingerprint=np.asarray(fingerprint))
    return table


def _stored(path: Path, records: Int[np.ndarray, " pairs"], fingerprint: str) -> np.ndarray | None:
    """The table in a file; None: it was not computed from this data and these weights."""
    if not path.exists():
        return None
    arrays = read_arrays(path, ("log_probs",), optional=("fingerprint",))
    if arrays is None:
        return None
    table = arrays["log_probs"]
    fits = table.ndim == 2 and table.shape[1] == 2 and records.max(initial=-1) < len(table)
    if not fits or not np.isfinite(table[records]).all():
        notice(f"{path}: not the log-probs of these pairs; recomputed")
        return None
    if "fingerprint" not in arrays:
        notice(f"{path}: has no fingerprint (of an earlier version); used without a check")
    elif str(arrays["fingerprint"]) != fingerprint:
        notice(f"{path}: computed from other data or weights; recomputed")
        return None
    return table
