"""Pairs as they come: written at once, each once, the all too similar left out, all counted."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.collection.validity import fault, similarity
from jaxalign.data.records import Text, transcript
from jaxalign.errors import UserError
from jaxalign.files import json_value, open_text


@dataclass(kw_only=True)
class Statistics:
    """What was written and what was not."""

    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Pairs that were not written, by reason."""
    characters: Counter[str] = field(default_factory=Counter)
    """Of the prompts, chosen and rejected responses."""
    words: dict[str, Counter[str]] = field(default_factory=lambda: {})
    """Of each side, pairs of words by their number."""
    longer: float = 0.0
    """Pairs whose chosen response has more characters; equal ones count half."""

    def add(self, prompt: str, chosen: str, rejected: str) -> None:
        """Count a pair."""
        self.pairs += 1
        self.longer += 1.0 if len(chosen) > len(rejected) else 0.5 * (len(chosen) == len(rejected))
        for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            self.characters[name] += len(text)
            said = text.lower().split()
            count = self.words.setdefault(name, Counter())
            count.update(" ".join(pair) for pair in itertools.pairwise(said))

    def summary(self) -> dict[str, Any]:
        """Plain values: lengths, and distinct-2 of each side (distinct word pairs by all)."""
        number = max(self.pairs, 1)
        return {
            "pairs": self.pairs,
            "left_out": dict(sorted(self.left_out.items())),
            "mean_characters": {k: v / number for k, v in self.characters.items()},
            "chosen_longer": self.longer / number,
            "distinct_2": {
                name: len(count) / max(count.total(), 1) for name, count in self.words.items()
            },
        }


class PairWriter:
    """Writes preference pairs with their provenance, a line each, as they come.

    Args:
      path: JSON Lines file, begun anew: what was asked before is found where answers are kept.
      most_similar: pairs whose sides are more alike (`similarity`) are left out, and so are those
        whose chosen response cannot be used (`fault`).
    """

    def __init__(self, path: Path, *, most_similar: float = 0.95):
        if not 0 < most_similar <= 1:
            raise UserError(f"most_similar: {most_similar} is not in (0, 1]")
        self.path, self.most_similar, self.statistics = path, most_similar, Statistics()
        self._seen: set[tuple[str, str, str]] = set()

    def __enter__(self) -> "PairWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_text(self.path, "w")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(
        self, prompt: Text, chosen: str, rejected: str, provenance: Mapping[str, Any]
    ) -> bool:
        """Write a pair, unless there is a reason not to; whether it was written."""
        said = transcript(prompt)
        key = said, chosen, rejected
        reason = ""
        if wrong := fault(chosen, said):
            reason = f"chosen: {wrong}"
        elif not rejected.strip():
            reason = "rejected: empty"
        elif key in self._seen:
            reason = "duplicate"
        elif chosen == rejected or similarity(chosen, rejected) > self.most_similar:
            reason = "nearly identical"
        if reason:
            self.statistics.left_out[reason] += 1
            return False
        self._seen.add(key)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "provenance": provenance}
        write_row(self._file, row)
        self.statistics.add(*key)
        return True


def write_row(file: Any, row: Mapping[str, Any]) -> None:
    """A line of JSON, on disk at once; numbers that are not finite are null."""
    file.write(json.dumps(json_value(row), ensure_ascii=False) + "\n")
    file.flush()


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Neighbours together."""
    return [items[at : at + size] for at in range(0, len(items), size)]
