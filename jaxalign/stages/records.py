"""The records of a run: read from its sources, split and counted, with notes on overlaps."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from jaxalign.config import TrainConfig
from jaxalign.data import ReadReport, split_holdout
from jaxalign.data.mixtures import BySource, Mixture, WeightedSource, weighted_sources
from jaxalign.data.record_index import IndexedRecords, joined
from jaxalign.data.sources import RecordKind, holdout_value
from jaxalign.errors import UserError
from jaxalign.stages.streaming import records_on_disk, streams


def say(line: str) -> None:
    """Print a line in the first process."""
    if jax.process_index() == 0:
        print(line)


def source_of(record: Any) -> str:
    """File and line of a record."""
    return f"{record.source}:{record.line}"


def sources_of(records: Sequence[Any]) -> Sequence[str]:
    """File and line of each record."""
    return records.places if isinstance(records, IndexedRecords) else list(map(source_of, records))


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Training and held-out records of a run's sources, source after source."""

    train: Sequence[Any]
    """A list, or `IndexedRecords`."""
    held_out: Sequence[Any]
    train_source: np.ndarray
    """Number of each training record's source."""
    held_out_source: np.ndarray
    sources: list[WeightedSource]
    held_out_sources: list[WeightedSource]
    temperature: float

    def mixture(self, record_index: np.ndarray) -> Mixture | None:
        """How often the training examples of these records are used; None: all equally often."""
        if len(self.sources) == 1:
            return None
        return Mixture(
            source=self.train_source[record_index],
            weights=tuple(one.weight for one in self.sources),
            temperature=self.temperature,
        )

    def by_source(self) -> BySource | None:
        """The held-out records of each source; None: there is one."""
        if len(self.held_out_sources) == 1:
            return None
        labels = tuple(one.label for one in self.held_out_sources)
        return BySource(labels=labels, source=self.held_out_source)


def run_records(
    kind: RecordKind[Any],
    sources: Sequence[str] | str | None,
    held_out_sources: Sequence[str] | str | None,
    config: TrainConfig,
    report: dict[str, Any],
    names: tuple[str, str],
) -> RunRecords:
    """Read the sources of a run, and hold records out where no source of these is given.

    Args:
      kind: of the records.
      sources: as in `TrainConfig.data`.
      held_out_sources: of held-out records; none: a fraction of the prompts of every source.
      config: of the run.
      report: of what was read.
      names: of the two kinds of sources in the report and in errors.

    Raises:
      UserError: a source cannot be read, or no record is left to train on.
    """
    training = weighted_sources(sources, names[0])
    evaluation = weighted_sources(held_out_sources, names[1]) if held_out_sources else training

    on_disk = streams(config, [one.source for one in (*training, *evaluation)])

    def read_all(which: list[WeightedSource], name: str) -> list[Sequence[Any]]:
        each = [name] if len(which) == 1 else [f"{name} {one.label}" for one in which]
        return [
            read(kind, one.source, config, report, at, on_disk=on_disk)
            for one, at in zip(which, each, strict=True)
        ]

    train = read_all(training, names[0])
    if held_out_sources:
        held_out = read_all(evaluation, names[1])
    else:
        split = [_split(one, config) for one in train]
        train, held_out = [kept for kept, _ in split], [held for _, held in split]
        if config.holdout and not any(map(len, held_out)):
            say_nothing_held_out(names[0], config, sum(map(len, train)))
    train = [one[: config.max_records] for one in train]
    held_out = [one[: config.max_eval_records] for one in held_out]
    if held_out_sources:
        tell_overlap(train, held_out, names[1], config)
    for source, records in zip(training, train, strict=True):
        if not records:
            raise UserError(
                f"{names[0]}: {source.source}: no records left to train on; lower --holdout"
            )
    return RunRecords(
        train=_one_after_the_other(train),
        held_out=_one_after_the_other(held_out),
        train_source=np.repeat(np.arange(len(train)), [len(x) for x in train]),
        held_out_source=np.repeat(np.arange(len(held_out)), [len(x) for x in held_out]),
        sources=training,
        held_out_sources=evaluation,
        temperature=config.data_temperature,
    )


def say_nothing_held_out(name: str, config: TrainConfig, records: int) -> None:
    """Say that `holdout` holds out none of the records of that name."""
    say(
        f"{name}: --holdout {config.holdout:g} holds out none of {records:,} records: nothing is "
        "evaluated"
    )


def tell_overlap(
    train: Sequence[Sequence[Any]],
    held_out: Sequence[Sequence[Any]],
    name: str,
    config: TrainConfig,
) -> None:
    """Say how many held-out records have the prompt of a training record, if any has.

    Args:
      train: records of each source.
      held_out: records of each source.
      name: of the held-out ones.
      config: of the run.
    """
    known = _prompts(train, config)
    shared = int(np.isin(_prompts(held_out, config), known).sum())
    if shared:
        say(
            f"{name}: {shared:,} of {sum(map(len, held_out)):,} records have a prompt that is also "
            "trained on; they are evaluated all the same"
        )


def _prompts(sources: Sequence[Sequence[Any]], config: TrainConfig) -> Float64[np.ndarray, " n"]:
    """A number of each record that its prompt determines."""
    values = [
        records.prompt_values
        if isinstance(records, IndexedRecords)
        else np.array([holdout_value(record, config.seed) for record in records], np.float64)
        for records in sources
    ]
    return np.concatenate(values)


def _split(records: Sequence[Any], config: TrainConfig) -> tuple[Sequence[Any], Sequence[Any]]:
    """Training and held-out records."""
    if isinstance(records, IndexedRecords):  # of the same seed
        return records.split(config.holdout)
    return split_holdout(records, config.holdout, seed=config.seed)


def _one_after_the_other(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    indexed = [part for part in parts if isinstance(part, IndexedRecords)]
    return joined(indexed) if indexed else list(itertools.chain.from_iterable(parts))


def read(
    kind: RecordKind[Any],
    source: str,
    config: TrainConfig,
    report: dict[str, Any],
    name: str,
    *,
    on_disk: bool,
) -> Sequence[Any]:
    """The records of a source, with their counts in the report under a name.

    Args:
      kind: of the records.
      source: as for `preference_records`.
      config: of the run.
      report: of what was read.
      name: in the report.
      on_disk: whether they stay on disk: `IndexedRecords`.

    Raises:
      UserError: a record cannot be used, or there is none.
    """
    counted = ReadReport()
    if on_disk:
        records, counted = records_on_disk(kind, source, config, name)
    else:
        records = list(kind.read(source, bad_records=config.bad_records, report=counted))
    report[name] = {"source": source} | dataclasses.asdict(counted)
    if counted.skipped:
        say(f"{source}: {counted.summary()}")
    if not records:
        raise UserError(f"{source}: no usable record")
    return records


def counted_mixture(
    records: RunRecords, record_index: np.ndarray, report: dict[str, Any], what: str
) -> Mixture | None:
    """The mixture of training examples, printed and counted in the report; None: of one source.

    Args:
      records: of the run.
      record_index: number of each example's record.
      report: of what was read.
      what: the examples are.
    """
    mixture = records.mixture(record_index)
    if mixture is None:
        return None
    texts = []
    for one, (examples, used) in zip(records.sources, mixture.sizes, strict=True):
        source = one.source if one.weight == 1 else f"{one.source}, weight {one.weight:g}"
        counts = {"source": source, "examples": examples, "used_an_epoch": used}
        report[f"mixture of {what} {one.label}"] = counts
        texts.append(f"{one.label} {used:,} of {examples:,} ({used / mixture.examples:.0%})")
    say(f"{what} of an epoch: {', '.join(texts)}")
    return mixture
