"""Rows and pairs on disk: written as they arrive, filtered, and counted."""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.collection.validity import fault, similarity
from jaxalign.data.records import Text, transcript
from jaxalign.data.written import prompt_fields
from jaxalign.errors import UserError
from jaxalign.files import json_value, rewriting


@dataclass(kw_only=True)
class Statistics:
    """Counts and lengths of the pairs that were written, and of those left out."""

    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of pairs that were not written, by reason."""
    characters: Counter[str] = field(default_factory=Counter)
    """Number of characters of all prompts, chosen and rejected responses."""
    words: dict[str, Counter[str]] = field(default_factory=lambda: {})
    """Counts of the word pairs of each side."""
    longer: float = 0.0
    """Number of pairs whose chosen response is longer in characters; equal lengths count half."""

    def add(self, prompt: str, chosen: str, rejected: str) -> None:
        """Count a pair."""
        self.pairs += 1
        self.longer += 1.0 if len(chosen) > len(rejected) else 0.5 * (len(chosen) == len(rejected))
        for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            self.characters[name] += len(text)
            words = text.lower().split()
            count = self.words.setdefault(name, Counter())
            count.update(" ".join(pair) for pair in itertools.pairwise(words))

    def summary(self) -> dict[str, Any]:
        """Plain values: mean lengths, and distinct-2 of each side (distinct / all word pairs)."""
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
    """Writes preference pairs with their provenance, one line each, as they arrive.

    Args:
      path: JSON Lines file, replaced once all pairs are written; a resumed command makes the same
        pairs again from the answers that are kept.
      most_similar: largest similarity of the two responses (`similarity`). More similar pairs are
        left out, and so are pairs whose chosen response cannot be used (`fault`).

    Raises:
      UserError: `most_similar` is not in (0, 1].
    """

    def __init__(self, path: Path, *, most_similar: float = 0.95):
        if not 0 < most_similar <= 1:
            raise UserError(f"most_similar: {most_similar} is not in (0, 1]")
        self.path, self.most_similar, self.statistics = path, most_similar, Statistics()
        self._seen: set[tuple[str, str, str]] = set()

    def __enter__(self) -> "PairWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        self._file = self._open.enter_context(rewriting(self.path))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(
        self, prompt: Text, chosen: str, rejected: str, provenance: Mapping[str, Any]
    ) -> bool:
        """Write a pair, unless there is a reason not to; returns whether it was written."""
        text = transcript(prompt)
        key = text, chosen, rejected
        reason = ""
        if wrong := fault(chosen, text):
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
        row = {"chosen": chosen, "rejected": rejected, "provenance": provenance}
        write_row(self._file, prompt_fields(prompt) | row)
        self.statistics.add(*key)
        return True


@contextlib.contextmanager
def open_files(folder: Path, *names: str) -> Iterator[dict[str, Any]]:
    """The files FOLDER/NAME.jsonl to write, by their names; they are replaced in the end."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(rewriting(folder / f"{name}.jsonl")) for name in names}


def write_row(file: Any, row: Mapping[str, Any]) -> None:
    """A line of JSON, on disk at once; numbers that are not finite are null."""
    file.write(json.dumps(json_value(row), ensure_ascii=False) + "\n")
    file.flush()


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive items in batches."""
    return [items[at : at + size] for at in range(0, len(items), size)]
