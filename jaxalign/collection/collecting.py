"""A method applied to a file of prompts: its pairs, its other files and their statistics."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxalign.backends import BackendOptions, Cached, Decoding, make_backend
from jaxalign.backends.cached import AnswerFile
from jaxalign.collection.writing import PairWriter
from jaxalign.data import PromptRecord, prompt_records
from jaxalign.data.reading import BadRecords
from jaxalign.data.records import transcript
from jaxalign.files import write_text

FILES = (
    *("pairs.jsonl", "statistics.json", "answers.jsonl", "verdicts.jsonl", "sft.jsonl"),
    *("traces.jsonl", "encounters.jsonl", "imitation.jsonl", "self_critic.jsonl"),
    *("realignment.jsonl", "comparisons.jsonl"),
)
"""Files that the methods write."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What a method reads, and where it writes."""

    model: Cached
    """Model that writes."""
    records: Sequence[PromptRecord]
    """Prompts with their sources."""
    bad_records: BadRecords
    """Response to a record that cannot be used, in further files of a method."""
    decoding: Decoding
    """Decoding of all texts."""
    batch_size: int
    """Number of prompts in a batch."""
    folder: Path
    """Folder of the method's files."""
    pairs: PairWriter
    """Writer of pairs.jsonl."""
    answers: AnswerFile
    """File of everything that was answered."""
    open_model: Callable[[str], Cached]
    """Opens a further model by its name; its answers go to the same file."""

    @property
    def texts(self) -> list[str]:
        """The prompts as texts."""
        return [transcript(record.prompt) for record in self.records]

    def provenance(self, method: str, record: PromptRecord, **more: Any) -> dict[str, Any]:
        """The provenance of a pair.

        Args:
          method: its name.
          record: the prompt.
          **more: facts about the pair.
        """
        line = f"{record.source}:{record.line}"
        return {"way": method, "model": self.model.identity, **more, "from": line}


@runtime_checkable
class Method(Protocol):
    """A way to make preference data."""

    def collect(self, collection: Collection) -> dict[str, Any]:
        """Write pairs to `collection.pairs` and other data to the folder; returns counts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The result of `collect`."""

    path: Path
    """File of the pairs."""
    statistics: dict[str, Any]
    """Content of statistics.json."""
    requests: int
    """Number of prompts that the model answered now; the others were answered before."""


def collect(
    method: Method,
    *,
    model: str,
    prompts: str,
    folder: Path,
    decoding: Decoding,
    options: BackendOptions | None = None,
    limit: int | None = None,
    bad_records: BadRecords = "error",
    most_similar: float = 0.95,
) -> Collected:
    """Collect preference data, or resume: answers that are in the folder are not requested again.

    Args:
      method: how pairs are made.
      model: name of the model that writes, as in `make_backend`.
      prompts: file of prompts, as in `prompt_records`.
      folder: output folder: pairs.jsonl, statistics.json and the method's own files.
      decoding: decoding of all texts.
      options: options of the models.
      limit: largest number of prompts, counted from the first; None: all.
      bad_records: response to a record that cannot be used.
      most_similar: largest similarity of chosen and rejected, as in `PairWriter`.

    Raises:
      UserError: a file, a model or an option of the method cannot be used.
    """
    options = options or BackendOptions()
    records = itertools.islice(prompt_records(prompts, bad_records=bad_records), limit)
    records = list(records)
    answers = AnswerFile(folder / "answers.jsonl")

    def open_model(name: str) -> Cached:
        return Cached(make_backend(name, options), answers)

    writer = open_model(model)
    with PairWriter(folder / "pairs.jsonl", most_similar=most_similar) as pairs:
        counts = method.collect(
            Collection(
                model=writer,
                records=records,
                bad_records=bad_records,
                decoding=decoding,
                batch_size=options.batch_size,
                folder=folder,
                pairs=pairs,
                answers=answers,
                open_model=open_model,
            )
        )
    statistics = pairs.statistics.summary() | counts
    statistics |= {"responses_without_text": dict(writer.failures)}
    statistics |= {"model": writer.identity, "decoding": vars(decoding)}
    text = json.dumps(statistics, indent=1, ensure_ascii=False)
    write_text(folder / "statistics.json", text + "\n")
    return Collected(path=pairs.path, statistics=statistics, requests=writer.asked)
