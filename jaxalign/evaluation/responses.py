"""A file of a model's responses to prompts: written as they end, resumed where it ends."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxalign.backends import (
    Backend,
    BackendOptions,
    Decoding,
    Generation,
    Prompt,
    make_backend,
)
from jaxalign.backends.cached import AnswerFile, Cached
from jaxalign.data import PromptRecord
from jaxalign.data.records import tools_of
from jaxalign.errors import UserError
from jaxalign.files import open_text, read_json, write_json, writing
from jaxalign.progress import Progress


def make_responder(name: str, options: BackendOptions, path: Path) -> Backend:
    """The backend of that name, for a file of responses.

    Args:
      name: as for `make_backend`.
      options: as for `make_backend`.
      path: of the file; the answers of an endpoint are kept beside it, and not requested again.
    """
    model = make_backend(name, options)
    if not name.startswith("openai:"):
        return model
    return Cached(model, AnswerFile(path.with_name(f"{path.name}.answers.jsonl")))


def respond(
    path: Path,
    model: Backend,
    records: Sequence[PromptRecord],
    decoding: Decoding,
    *,
    prompts: Sequence[Prompt] | None = None,
    samples: int = 1,
    batch_size: int = 8,
    settings: Mapping[str, Any] | None = None,
    text_of: Callable[[str], str] = str,
    say: Callable[[str], Any] = str,
) -> None:
    """Write a model's responses, {id, prompt, response} rows; what an earlier call wrote is kept.

    Args:
      path: of the file; its settings are beside it.
      model: writes the responses.
      records: the prompts as they are written.
      decoding: how responses are sampled.
      prompts: the prompts as the model reads them; None: as they are.
      samples: number of responses to each prompt.
      batch_size: number of prompts in a batch; whole batches of an earlier call are kept.
      settings: what the responses depend on besides model, samples and decoding.
      text_of: the response that is written, from what the model wrote.
      say: is given a line on what is there, and on what was written.

    Raises:
      UserError: the file was made with other settings or from other prompts, or holds more
        responses than are asked for, a prompt does not fit, or some responses are missing in the
        end.
    """
    prompts = [record.prompt for record in records] if prompts is None else prompts
    encode = getattr(model, "encode", None)  # a model on this machine counts the tokens first
    if encode is not None:
        encode(prompts, decoding.max_tokens, [f"{one.source}:{one.line}" for one in records])
        for note in cast(Any, model).notes():
            say(note)
    known = {"model": model.identity, "samples": samples, **vars(decoding), **(settings or {})}
    done = _resume(path, known, records, samples, batch_size)
    if done:
        say(f"{path}: {done:,} of {len(records):,} prompts have their responses")
    written = cut = 0
    missing: list[str] = []
    ready: dict[int, list[Generation]] = {}
    with (
        open_text(path, "a") as file,
        Progress("prompts", len(records), done=done) as progress,
    ):
        following = done

        def keep(at: int, generations: list[Generation]) -> None:
            """Write what is complete, in the order of the prompts."""
            nonlocal written, cut, following
            ready[done + at] = generations
            while following in ready:
                record = records[following]
                for sample, one in enumerate(ready.pop(following)):
                    if one.failure:
                        missing.append(f"{record.source}:{record.line}: {one.failure}")
                        continue
                    written, cut = written + 1, cut + (not one.finished)
                    row = {"id": _id(record, sample, samples), "prompt": record.prompt}
                    if tools := tools_of(record.prompt):
                        row["tools"] = tools
                    row["response"] = text_of(one.text)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                following += 1
            file.flush()
            progress(following)

        if done < len(records):
            model.generate(prompts[done:], decoding, samples=samples, keep=keep)
    say(f"{path}: {written:,} responses written, {cut:,} cut at {decoding.max_tokens} tokens")
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}{more}; {path} lacks {len(missing):,} responses, and the same command "
            "requests them again"
        )


def _resume(
    path: Path,
    settings: Mapping[str, Any],
    records: Sequence[PromptRecord],
    samples: int,
    batch_size: int,
) -> int:
    """The number of prompts whose responses are kept: whole batches; what follows is cut off.

    Only whole batches are kept, so that a resumed file is the same as an uninterrupted one. From
    the first missing response on, all are requested again; an endpoint's earlier answers are found
    in the file of its answers.

    Raises:
      UserError: the file was made with other settings or from other prompts, or holds more
        responses than are asked for.
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
            made, now = _where_unlike(before.get(name), settings[name])
            raise UserError(
                f"{path}: was made with {name} {made!r}, not {now!r}; set another --output, or "
                "delete it"
            )
    lines = path.read_bytes().splitlines(keepends=True)
    whole = lines[: len(lines) - bool(lines and not lines[-1].endswith(b"\n"))]
    slots = [
        (_id(record, sample, samples), record.prompt, list(tools_of(record.prompt)))
        for record in records
        for sample in range(samples)
    ]
    rows = [_answered(line) for line in whole]
    known = {json.dumps(slot) for slot in slots}
    for number, row in enumerate(rows[: len(slots)], 1):
        if json.dumps(row) not in known:
            raise UserError(
                f"{path}:{number}: another prompt than in {records[0].source}; set another "
                "--output, or delete it"
            )
    if len(whole) > len(slots):
        raise UserError(
            f"{path}: holds {len(whole):,} responses, {len(slots):,} were asked for; set another "
            "--output"
        )
    same = (row == slot for row, slot in zip(rows, slots, strict=False))
    done = sum(itertools.takewhile(bool, same)) // samples
    if done < len(records):
        done -= done % batch_size
    os.truncate(path, sum(map(len, lines[: done * samples])))
    return done


def _where_unlike(before: Any, now: Any) -> tuple[Any, Any]:
    """Two values; of long texts with as many words, the first that differs and the one before."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return before, now
    words = before.split(), now.split()
    at = next((at for at, (x, y) in enumerate(zip(*words, strict=False)) if x != y), 0)
    if len(words[0]) != len(words[1]) or at < 2:
        return before, now
    made, wanted = (" ".join(["...", *own[at - 1 : at + 1]]) for own in words)
    return made, wanted


def _id(record: PromptRecord, sample: int, samples: int) -> str:
    """Tells equal prompts and the samples of a prompt apart."""
    return str(record.line) if samples == 1 else f"{record.line}.{sample}"


def _answered(line: bytes) -> tuple[Any, Any, Any]:
    """Id, prompt and tools that a line of the file answers; None where it is damaged."""
    try:
        row = json.loads(line)
        return row["id"], row["prompt"], row.get("tools", [])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, None, None
