"""`ledger.jsonl` of a run folder: why the log-probs of single pairs and tokens moved."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.data.batches import PairBatch
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.entanglement.ledger import PARTS
from jaxalign.errors import notice
from jaxalign.files import json_value, open_text, write_text
from jaxalign.stages.inputs import TokenizedData
from jaxalign.stages.kind import RunContext
from jaxalign.stages.models import stage_folder
from jaxalign.training.checkpoints import newest_step
from jaxalign.training.ledger import BATCH, HELD_OUT, SIDES, Entries
from jaxalign.training.stage import Feed, Stage, Step

LEDGER = "ledger.jsonl"
"""File in the run folder."""
MOST_TOKENS = 32
"""Number of tokens of a line: those that moved most, per side."""


def with_ledger(
    context: RunContext, stage: Stage, feed: Feed, put: Callable[[PairBatch], PairBatch]
) -> Feed:
    """The feed with held-out pairs for the ledger, and its file.

    The held-out pairs are the first, as many as a batch has; without any, only the batches are
    watched.

    Args:
      context: of the run.
      stage: that keeps a ledger.
      feed: without one.
      put: host batch -> device batch.
    """
    data = context.data[stage.name]
    assert isinstance(data, TokenizedData)
    first = data.first_held_out(stage.batch_size)
    path = context.folder / LEDGER
    alone = jax.process_count() == 1
    if alone:
        rewind(path, newest_step(stage_folder(context.folder, stage.name)) or 0)
    elif jax.process_index() == 0:
        notice(f"{path}: not written by several processes; metrics.jsonl has the means")

    def record(step: int, entries: Mapping[str, Entries], batch: PairBatch) -> None:
        pairs = {} if first is None else {HELD_OUT: first}
        write(path, step, entries, {BATCH: batch, **pairs}, context.tokenizer)

    placed = None if first is None else put(first)

    def around(step: Step) -> Step:
        if placed is None:
            return step
        return lambda state, frozen, batch: step(state, {**frozen, HELD_OUT: placed}, batch)

    return dataclasses.replace(feed, record=record if alone else None, around=around)


def write(
    path: Path,
    step: int,
    entries: Mapping[str, Entries],
    pairs: Mapping[str, PairBatch],
    tokenizer: Tokenizer,
) -> None:
    """Append a line per set of pairs: the parts of each pair, and the tokens that moved most.

    Args:
      path: of the file.
      step: number of updates.
      entries: the ledger of each set of pairs, on the host.
      pairs: the same pairs.
      tokenizer: of the run.
    """
    with open_text(path, "a") as file:
        for name, one in entries.items():
            batch = pairs[name]
            line = {"step": step, "pairs_of": name, "pairs": pair_entries(one, batch)}
            line["tokens"] = {
                side: moved_most(one, batch, at, tokenizer) for at, side in enumerate(SIDES)
            }
            file.write(json.dumps(json_value(line), ensure_ascii=False) + "\n")


def pair_entries(entries: Entries, batch: PairBatch) -> list[dict[str, Any]]:
    """`record` (its number), and the parts of the changes of `chosen` and `rejected`, per pair."""
    rows = []
    for at in np.flatnonzero(np.asarray(entries.weight) > 0):
        row: dict[str, Any] = {"record": int(batch.record_index[at])}
        for side, label in enumerate(SIDES):
            row[label] = {part: _short(getattr(entries.changes, part)[at, side]) for part in PARTS}
        rows.append(row)
    return rows


def moved_most(
    entries: Entries, batch: PairBatch, side: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The tokens of one side whose log-probs moved most, summed over their occurrences.

    Args:
      entries: the ledger of the pairs.
      batch: the pairs.
      side: 0 for chosen, 1 for rejected.
      tokenizer: of the run.

    Returns:
      Per token: `token` as text, `count`, and the sums `gradient` (own and others), `optimiser` and
      `curvature` in nats.
    """
    width = np.asarray(entries.tokens.gradient).shape[-1]
    ids = np.asarray(batch.response_tokens)[:, side, :width]
    lengths = np.asarray(batch.response_length)[:, side]
    real = (np.arange(width) < lengths[:, None]) & (np.asarray(entries.weight) > 0)[:, None]
    kinds, index = np.unique(ids[real], return_inverse=True)
    sums = {
        part: np.bincount(
            index, np.asarray(getattr(entries.tokens, part))[:, side][real], len(kinds)
        )
        for part in ("gradient", "optimiser", "curvature")
    }
    count = np.bincount(index, minlength=len(kinds))
    order = np.argsort(-np.abs(sum(sums.values())), kind="stable")[:MOST_TOKENS]
    texts = tokenizer.convert_ids_to_tokens(kinds[order].tolist())
    return [
        {"token": text, "count": int(count[at])} | {x: _short(y[at]) for x, y in sums.items()}
        for text, at in zip(texts, order, strict=True)
    ]


def _short(value: Any) -> float:
    return float(f"{float(value):.7g}")


def rewind(path: Path, step: int) -> None:
    """Drop the lines after a step, which a resumed run writes again."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            notice(f"{path}:{number}: not a line of a ledger; it is dropped")
    write_text(path, "".join(f"{line}\n" for line in kept))
