"""`streaming`: records and tokens of large sources are kept on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.config import TrainConfig
from jaxalign.data import ReadReport, TokenizeReport
from jaxalign.data.building import ALONE, CACHE, Processes
from jaxalign.data.reading import source_files
from jaxalign.data.record_index import IndexedRecords, index_records
from jaxalign.data.sources import RecordKind
from jaxalign.data.token_store import stored_tokens
from jaxalign.data.tokenizers import Tokenizer

R = TypeVar("R")

LARGE = 2**30
"""Bytes of the files of a run's sources from which `auto` streams them."""


def streams(config: TrainConfig, sources: Sequence[str]) -> bool:
    """Whether the records of these sources, which are used together, stay on disk.

    Those of "embedded" are made in memory, and so are the others beside them.
    """
    if config.streaming == "never" or "embedded" in sources:
        return False
    if config.streaming == "always":
        return True
    files = [file for source in set(sources) for file in source_files(source)[0]]
    large = sum(file.stat().st_size for file in files if file.exists()) >= LARGE
    return bool(processes().first(np.asarray(large)))


def processes() -> Processes:
    """The processes of this run."""
    if jax.process_count() == 1:
        return ALONE
    return Processes(
        index=jax.process_index(),
        count=jax.process_count(),
        first=lambda value: np.asarray(multihost_utils.broadcast_one_to_all(value)),
        meet=multihost_utils.sync_global_devices,
    )


def records_on_disk(
    kind: RecordKind[R], source: str, config: TrainConfig, name: str
) -> tuple[IndexedRecords[R], ReadReport]:
    """The records of a source by their index; one line says where it is.

    Args:
      kind: of the records.
      source: as for `preference_records`.
      config: of the run.
      name: of the source's field, for the line.
    """
    records, report = index_records(
        source,
        kind,
        cache=cache_of(config),
        seed=config.seed,
        bad_records=config.bad_records,
        processes=processes(),
    )
    if jax.process_index() == 0:
        where = ", ".join(str(folder) for folder in records.folders)
        print(f"{name}: {len(records):,} records of {source} stay on disk, indexed in {where}")
    return records, report


def tokens_on_disk(
    tokenize: Callable[..., Any],
    records: IndexedRecords[Any],
    tokenizer: Tokenizer,
    config: TrainConfig,
    name: str,
    **options: Any,
) -> tuple[Any, TokenizeReport]:
    """Tokens and counts of records, by `stored_tokens`; one line says how many.

    Args:
      tokenize: as in `stored_tokens`.
      records: at least one.
      tokenizer: of the run.
      config: of the run.
      name: of the tokens.
      **options: of `tokenize`.
    """
    tokens, report = stored_tokens(
        tokenize,
        records,
        tokenizer,
        cache=cache_of(config),
        label=name,
        processes=processes(),
        **options,
    )
    if jax.process_index() == 0:
        counts = f"{report.tokens:,} tokens of {report.records:,} records"
        print(f"{name.replace('_', ' ')}: {counts} stay on disk")
    return tokens, report


def cache_of(config: TrainConfig) -> Path:
    """The folder of indexes and tokens, which the runs of an output folder share."""
    return Path(config.output) / CACHE
