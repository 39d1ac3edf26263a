"""`jaxalign generate`: a model's responses to a file of prompts."""

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from jaxalign.backends import (
    Backend,
    BackendOptions,
    Decoding,
    Prompt,
    make_backend,
    make_embedder,
)
from jaxalign.backends.cached import AnswerFile, Cached
from jaxalign.commands.arguments import add_bad_records, add_chat, parser, within
from jaxalign.config import AtLeastOne, Count, Fraction, NonNegative, Positive, Seed, Share
from jaxalign.data import PromptRecord, prompt_records
from jaxalign.errors import UserError
from jaxalign.files import check_output, locked, open_text, read_json, write_json, writing
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.progress import Progress
from jaxalign.prompting import Composer, PromptArtefact, read_artefact
from jaxalign.prompting.composing import without_marks

ANSWERS = ".answers.jsonl"
"""Behind the output's name: what an endpoint has answered."""


def main(arguments: Sequence[str]) -> int:
    """Generate what is missing, a batch at a time, each on disk before the next."""
    given = _flags().parse_args(arguments)
    decoding = Decoding(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        stop=tuple(given.stop),
        seed=given.seed,
    )
    if given.samples > 1 and given.temperature == 0:
        raise UserError("samples: at temperature 0 all of them are the same; set --temperature")
    check_output(given.output, "--output")
    enable_compilation_cache()
    with locked(given.output, "--output"):
        return _generate(given, decoding)


def _generate(given: argparse.Namespace, decoding: Decoding) -> int:
    records = list(
        itertools.islice(prompt_records(given.prompts, bad_records=given.bad_records), given.most)
    )
    places = [f"{record.source}:{record.line}" for record in records]
    model = make_backend(
        given.model,
        BackendOptions(
            tokenizer=given.tokenizer,
            batch_size=given.batch_size,
            prompt_format=given.prompt_format,
            chat=given.chat,
            dtype=given.dtype,
            workers=given.batch_size,
            completions=given.completions,
        ),
    )
    if given.model.startswith("openai:"):  # what was paid for is not asked again
        model = Cached(model, AnswerFile(given.output.with_name(given.output.name + ANSWERS)))
    prompts, artefact = [record.prompt for record in records], None
    if given.prompt_artefact is not None:
        artefact = read_artefact(given.prompt_artefact)
        prompts, decoding = _composed(artefact, model, records, decoding)
    if not given.model.startswith("openai:"):  # what does not fit is said before any work
        cast(Any, model).encode(prompts, decoding.max_tokens, places)
        for note in cast(Any, model).notes():
            print(note)
    settings = {"model": model.identity, "samples": given.samples, **vars(decoding)}
    settings["prompt_artefact"] = None if artefact is None else asdict(artefact)
    done = _begun(given.output, settings, records, given.samples, given.batch_size)
    if done:
        print(f"{given.output}: {done:,} of {len(records):,} prompts have their responses")
    written = cut = 0
    missing: list[str] = []
    with (
        open_text(given.output, "a") as file,
        Progress("prompts", len(records), done=done) as progress,
    ):
        for begin in range(done, len(records), given.batch_size):
            mine = records[begin : begin + given.batch_size]
            asked = prompts[begin : begin + given.batch_size]
            found = model.generate(asked, decoding, samples=given.samples)
            for record, generations in zip(mine, found, strict=True):
                for sample, one in enumerate(generations):
                    if one.failure:
                        missing.append(f"{record.source}:{record.line}: {one.failure}")
                        continue
                    written, cut = written + 1, cut + (not one.finished)
                    text = one.text if artefact is None else without_marks(one.text)
                    row = _row(record, text, sample, given.samples)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress(begin + len(mine))
    print(
        f"{given.output}: {written:,} responses written, {cut:,} cut at {given.max_tokens} tokens"
    )
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}{more}; {given.output} lacks {len(missing):,} responses, and the same "
            "command requests them again"
        )
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "generate",
        "A model's responses to prompts, as {prompt, response} rows that `jaxalign judge` reads. "
        "Run the same command again to resume.",
    )
    flags.add_argument(
        "--model",
        required=True,
        help="model: Hugging Face folder, Hub name, run folder, GGUF file or openai:URL#MODEL",
    )
    flags.add_argument(
        "--prompts",
        required=True,
        help="file of {prompt} rows; other fields are ignored; FILE#[:100] takes the first 100",
    )
    flags.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
    add_bad_records(flags)
    flags.add_argument(
        "--samples", type=within(AtLeastOne), default=1, help="number of responses to each prompt"
    )
    flags.add_argument(
        "--temperature",
        type=within(NonNegative),
        default=0.0,
        help="sampling temperature; 0: greedy decoding",
    )
    flags.add_argument(
        "--top-p",
        type=within(Fraction),
        default=1.0,
        help="keep the most likely tokens that hold this fraction of the probability; 1: all",
    )
    flags.add_argument(
        "--top-k", type=within(Count), default=0, help="keep the k most likely tokens; 0: all"
    )
    flags.add_argument(
        "--min-p",
        type=within(Share),
        default=0.0,
        help="keep tokens at least this fraction as likely as the most likely one; 0: all",
    )
    flags.add_argument(
        "--repetition-penalty",
        type=within(Positive),
        default=1.0,
        help="divisor of the logits of tokens that already occur; 1: none, RAHF's evaluation uses "
        "1.2",
    )
    flags.add_argument(
        "--max-tokens",
        type=within(AtLeastOne),
        default=128,
        help="largest number of tokens in a response",
    )
    flags.add_argument(
        "--prompt-artefact",
        type=Path,
        metavar="FILE",
        help="prompt.json of `jaxalign optimize-prompt`: its system prompt and examples (default: "
        "none)",
    )
    flags.add_argument(
        "--stop", nargs="*", default=[], help="strings that end a response (default: none)"
    )
    flags.add_argument("--seed", type=within(Seed), default=0, help="seed of the sampling")
    flags.add_argument(
        "--most",
        type=within(AtLeastOne),
        help="largest number of prompts, counted from the first (default: all)",
    )
    flags.add_argument(
        "--batch-size",
        type=within(AtLeastOne),
        default=8,
        help="number of prompts in a batch, or of simultaneous requests to an endpoint",
    )
    flags.add_argument("--prompt-format", default="{prompt}", help="text around a plain prompt")
    add_chat(flags)
    flags.add_argument(
        "--completions",
        action="store_true",
        help="endpoint (openai:): use the completions API, for base models",
    )
    flags.add_argument(
        "--tokenizer", help="tokenizer: folder or Hub name (default: the model's own)"
    )
    flags.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="data type of the computation",
    )
    return flags


def _composed(
    artefact: PromptArtefact,
    model: Backend,
    records: Sequence[PromptRecord],
    decoding: Decoding,
) -> tuple[list[Prompt], Decoding]:
    """Prompts with the artefact's instructions and examples, and where answers to them end."""
    composer = Composer(
        artefact.examples,
        shown=artefact.shown,
        embedder=make_embedder(artefact.embedder, model),
        layout=artefact.layout,
    )
    prompts = []
    for record in records:
        if not isinstance(record.prompt, str):
            raise UserError(
                f"{record.source}:{record.line}: a conversation; a prompt artefact takes texts"
            )
        prompts.append(composer.prompt(artefact.system_prompt, record.prompt))
    stops = tuple(dict.fromkeys((*decoding.stop, *composer.stops)))
    return prompts, replace(decoding, stop=stops)


def _row(record: PromptRecord, response: str, sample: int, samples: int) -> dict[str, Any]:
    """A line of the output; ids tell equal prompts and samples apart."""
    key = str(record.line) if samples == 1 else f"{record.line}.{sample}"
    return {"id": key, "prompt": record.prompt, "response": response}


def _begun(
    path: Path, settings: dict[str, Any], records: Sequence[PromptRecord], samples: int, batch: int
) -> int:
    """How many prompts an earlier command has finished, in whole batches; the rest is cut off.

    Whole batches alone make a resumed file the same as an uninterrupted one. From the first
    response that is missing on, all are requested again; of an endpoint, those that were answered
    are found in the file of its answers.

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
        raise UserError(f"{path}: exists, and was not made by this command; name another --output")
    before = read_json(beside, "list of settings")
    for name in settings:
        if before.get(name) != settings[name]:
            raise UserError(
                f"{path}: was made with {name} {before.get(name)!r}, not {settings[name]!r}; name "
                "another --output, or delete it"
            )
    lines = path.read_bytes().splitlines(keepends=True)
    whole = lines[: len(lines) - bool(lines and not lines[-1].endswith(b"\n"))]
    slots = [
        (_row(record, "", sample, samples)["id"], record.prompt)
        for record in records
        for sample in range(samples)
    ]
    rows = [_id_and_prompt(line) for line in whole]
    known = {json.dumps(slot) for slot in slots}
    for number, row in enumerate(rows[: len(slots)], 1):
        if json.dumps(row) not in known:
            raise UserError(
                f"{path}:{number}: another prompt than in {records[0].source}; name another "
                "--output, or delete it"
            )
    same = (row == slot for row, slot in zip(rows, slots, strict=False))
    kept = sum(itertools.takewhile(bool, same))
    done = kept // samples
    if done < len(records):
        done -= done % batch
    os.truncate(path, sum(map(len, lines[: done * samples])))
    return done


def _id_and_prompt(line: bytes) -> tuple[Any, Any]:
    """Which slot of the output a line fills; (None, None) where it is damaged."""
    try:
        row = json.loads(line)
        return row["id"], row["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, None
