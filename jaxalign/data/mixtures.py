"""Mixtures: several sources of records, and how often the records of each are used."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxalign.data.reading import exists, split_name
from jaxalign.errors import UserError, notice_once


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One source of a mixture."""

    source: str
    """As for `preference_records`: a file, a folder, tfds:NAME, a hub name, "embedded"."""
    weight: float
    """How often a record of it is used, relative to those of the other sources."""
    label: str
    """Its name in metrics and reports."""


def weighted_sources(
    texts: Sequence[str] | str | None, field: str = "data"
) -> list[WeightedSource]:
    """The sources of "SOURCE[:WEIGHT][#SPLIT]" texts; a source without a weight has 1.

    A label is the name of the source without folder and ending; of several with the same name, the
    later ones have a number.

    Args:
      texts: as typed.
      field: of the config, for errors.

    Raises:
      UserError: a weight is not positive, or there is no source.
    """
    texts = (texts,) if isinstance(texts, str) else texts
    if not texts:
        raise UserError(f"{field}: no source of records")
    found: list[WeightedSource] = []
    for text in texts:
        name, split = split_name(text)
        name, weight = _split_weight(name)
        if not 0 < weight < math.inf:
            raise UserError(f"{field}: {text}: a weight is a positive number")
        if weight != 1 and len(texts) == 1:
            notice_once(f"{text}: the weight has no effect: there is no other source")
        label = base = _label(name)
        taken, number = {one.label for one in found}, 1
        while label in taken:
            number += 1
            label = f"{base}-{number}"
        source = f"{name}#{split}" if split else name
        found.append(WeightedSource(source=source, weight=weight, label=label))
    return found


def _split_weight(name: str) -> tuple[str, float]:
    """Source and weight of "SOURCE[:WEIGHT]"; the weight is NaN where it is not a number."""
    source, _, weight = name.rpartition(":")
    if not source or exists(name):
        return name, 1.0
    try:
        return source, float(weight)
    except ValueError:
        return (name, 1.0) if source == "tfds" or not exists(source) else (source, math.nan)


def _label(name: str) -> str:
    """The last part of a source's name, without the endings of files."""
    last = Path(name.removeprefix("tfds:").partition("@")[0]).name
    return last.partition(".")[0] or last


@dataclass(frozen=True, kw_only=True)
class Mixture:
    r"""Which examples an epoch has, where those of several sources are not used equally often.

    With n_i examples and a weight w_i, source i has

    .. math:: m_i = \operatorname{round}\left(n_i v_i / \max_j v_j\right), \quad
              v_i = w_i\, n_i^{1/T - 1}

    of its examples in every epoch, at least one: all of the source with the largest v, and as many
    others as make the sources' shares proportional to w_i n_i^(1/T). No epoch has an example twice.
    Of a source that is not used whole, each epoch has the next m_i of one random order of its
    examples, so that after n_i epochs all were used m_i times. T is the temperature of multilingual
    pretraining (arXiv:1907.05019): infinite makes sources equally large.
    """

    source: Int[np.ndarray, " examples"]
    """The number of each example's source, in ascending order."""
    weights: tuple[float, ...]
    """w, a weight for each source."""
    temperature: float = 1.0
    """T, positive."""

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(n, m) of each source."""
        numbers = np.bincount(self.source, minlength=len(self.weights))
        some = numbers > 0
        rates = np.zeros(len(numbers))
        rates[some] = np.log(np.asarray(self.weights)[some])
        rates[some] += (1 / self.temperature - 1) * np.log(numbers[some])
        rates[some] = np.exp(rates[some] - rates[some].max())
        used = np.where(some, np.maximum(np.rint(rates * numbers), 1), 0).astype(np.int64)
        return tuple(zip(numbers.tolist(), used.tolist(), strict=True))

    @property
    def examples(self) -> int:
        """Number of examples in an epoch."""
        return sum(used for _, used in self.sizes)

    def epoch(self, number: int, seed: int) -> Int[np.ndarray, " examples"]:
        """The examples of an epoch, source after source.

        Args:
          number: of the epoch, from 0.
          seed: of the order in which examples of a source are used.
        """
        parts, first = [], 0
        for at, (examples, used) in enumerate(self.sizes):
            if used == examples:
                members = np.arange(examples)
            else:
                order = np.random.default_rng([seed, 4, at]).permutation(examples)
                members = np.sort(order[(number * used + np.arange(used)) % examples])
            parts.append(first + members)
            first += examples
        return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the examples, in every epoch; in place of a `Mixture`."""

    members: Int[np.ndarray, " members"]
    """Their numbers."""

    @property
    def examples(self) -> int:
        """Number of examples in an epoch."""
        return len(self.members)

    def epoch(self, number: int, seed: int) -> Int[np.ndarray, " members"]:
        """The examples of an epoch."""
        del number, seed
        return self.members


@dataclass(frozen=True, kw_only=True)
class BySource:
    """Which source each record comes from."""

    labels: tuple[str, ...]
    """Of the sources."""
    source: Int[np.ndarray, " records"]
    """Number of each record's source."""

    def members(self, record_index: Int[np.ndarray, " examples"]) -> list[np.ndarray]:
        """The examples of each source, by their records."""
        of_example = self.source[record_index]
        return [np.flatnonzero(of_example == at) for at in range(len(self.labels))]

    def label(self, record: int) -> str:
        """The label of a record's source."""
        return self.labels[int(self.source[record])]
