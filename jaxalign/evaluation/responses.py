"""A file of a model's responses to prompts: written a batch at a time, resumed where it ends."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.backends import Backend, Decoding, Prompt
from jaxalign.data import PromptRecord
from jaxalign.errors import UserError
from jaxalign.files import open_text, read_json, write_json, writing
from jaxalign.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Written:
    """Counts of what was written now."""

    responses: int
    cut: int
    """Responses that reached the largest number of tokens."""
    missing: Sequence[str]
    """Source and reason of each response that could not be had."""


def resume_responses(
    path: Path,
    settings: Mapping[str, Any],
    records: Sequence[PromptRecord],
    *,
    samples: int,
    batch_size: int,
) -> int:
    """Begin the file, or cut off what follows its last whole batch.

    Only whole batches are kept, so that a resumed file is the same as an uninterrupted one. From
    the first missing response on, all are requested again; an endpoint's earlier answers are found
    in the file of its answers.

    Args:
      path: of the file; its settings are beside it.
      settings: what the responses depend on besides the prompts.
      records: the prompts.
      samples: number of responses to each prompt.
      batch_size: number of prompts in a batch.

    Returns:
      The number of prompts whose responses are kept.

    Raises:
      UserError: the file was made with other settings or from other prompts.
    """
    beside = path.with_name(path.name + ".settings.json")
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(beside, settings)
        with writing(path):
            path.touch()  # last: a file without settings is taken for somebody else's
        return 0
    if not beside.exists():
        raise UserError(f"{path}: exists, and was not made by this command; set another --output")
    before = read_json(beside, "list of settings")
    for name in settings:
        if before.get(name) != settings[name]:
            raise UserError(
                f"{path}: was made with {name} {before.get(name)!r}, not {settings[name]!r}; set "
                "another --output, or delete it"
            )
    lines = path.read_bytes().splitlines(keepends=True)
    whole = lines[: len(lines) - bool(lines and not lines[-1].endswith(b"\n"))]
    slots = [
        (_id(record, sample, samples), record.prompt)
        for record in records
        for sample in range(samples)
    ]
    rows = [_id_and_prompt(line) for line in whole]
    known = {json.dumps(slot) for slot in slots}
    for number, row in enumerate(rows[: len(slots)], 1):
        if json.dumps(row) not in known:
            raise UserError(
                f"{path}:{number}: another prompt than in {records[0].source}; set another "
                "--output, or delete it"
            )
    same = (row == slot for row, slot in zip(rows, slots, strict=False))
    done = sum(itertools.takewhile(bool, same)) // samples
    if done < len(records):
        done -= done % batch_size
    os.truncate(path, sum(map(len, lines[: done * samples])))
    return done


def write_responses(
    path: Path,
    model: Backend,
    records: Sequence[PromptRecord],
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    samples: int,
    batch_size: int,
    done: int,
    text_of: Callable[[str], str] = str,
) -> Written:
    """Append the missing {id, prompt, response} rows, each batch on disk before the next.

    Args:
      path: of the file, as `resume_responses` leaves it.
      model: writes the responses.
      records: the prompts as they are written.
      prompts: the same as the model reads them.
      decoding: how responses are sampled.
      samples: number of responses to each prompt.
      batch_size: number of prompts in a batch.
      done: number of prompts whose responses are there.
      text_of: the response that is written, from what the model wrote.
    """
    written = cut = 0
    missing: list[str] = []
    with (
        open_text(path, "a") as file,
        Progress("prompts", len(records), done=done) as progress,
    ):
        for begin in range(done, len(records), batch_size):
            batch = slice(begin, begin + batch_size)
            generated = model.generate(prompts[batch], decoding, samples=samples)
            for record, generations in zip(records[batch], generated, strict=True):
                for sample, one in enumerate(generations):
                    if one.failure:
                        missing.append(f"{record.source}:{record.line}: {one.failure}")
                        continue
                    written, cut = written + 1, cut + (not one.finished)
                    row = {"id": _id(record, sample, samples), "prompt": record.prompt}
                    row["response"] = text_of(one.text)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress(begin + len(records[batch]))
    return Written(responses=written, cut=cut, missing=missing)


def _id(record: PromptRecord, sample: int, samples: int) -> str:
    """Tells equal prompts and the samples of a prompt apart."""
    return str(record.line) if samples == 1 else f"{record.line}.{sample}"


def _id_and_prompt(line: bytes) -> tuple[Any, Any]:
    """What a line of the file answers; (None, None) where it is damaged."""
    try:
        row = json.loads(line)
        return row["id"], row["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, None
