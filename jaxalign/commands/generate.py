"""`jaxalign generate`: a model's responses to a file of prompts."""

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxalign.backends import Decoding
from jaxalign.commands.arguments import parser
from jaxalign.data import PromptRecord, prompt_records
from jaxalign.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Generate what is missing, a batch at a time, each on disk before the next."""
    from jaxalign.backends.local import LocalModel

    given = _flags().parse_args(arguments)
    if given.samples < 1:
        raise UserError(f"samples: {given.samples} is not positive")
    if given.most is not None and given.most < 1:
        raise UserError(f"most: {given.most} is not positive")
    decoding = Decoding(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        stop=tuple(given.stop),
        seed=given.seed,
    )
    if given.samples > 1 and given.temperature == 0:
        raise UserError("samples: at temperature 0 all of them are the same; set --temperature")
    records = list(itertools.islice(prompt_records(given.prompts), given.most))
    model = LocalModel.load(
        given.model,
        tokenizer=given.tokenizer,
        batch_size=given.batch_size,
        prompt_format=given.prompt_format,
        strings_as_chat=given.chat,
        dtype=given.dtype,
    )
    places = [f"{record.source}:{record.line}" for record in records]
    model.encode([record.prompt for record in records], decoding.max_tokens, places)
    settings = {"model": model.identity, "samples": given.samples, **vars(decoding)}
    done = _begun(given.output, settings, records, given.samples, given.batch_size)
    if done:
        print(f"{given.output}: {done:,} of {len(records):,} prompts have their responses")
    cut = 0
    with given.output.open("a", encoding="utf-8") as file:
        for begin in _shown(range(done, len(records), given.batch_size)):
            mine = records[begin : begin + given.batch_size]
            prompts = [record.prompt for record in mine]
            found = model.generate(prompts, decoding, samples=given.samples, first=begin)
            for record, generations in zip(mine, found, strict=True):
                for sample, one in enumerate(generations):
                    cut += not one.finished
                    row = _row(record, one.text, sample, given.samples)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    written = (len(records) - done) * given.samples
    print(
        f"{given.output}: {written:,} responses written, {cut:,} cut at {given.max_tokens} tokens"
    )
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "generate",
        "A model's responses to prompts, as {prompt, response} rows that `jaxalign judge` reads. "
        "The same command goes on where an earlier one ended.",
    )
    flags.add_argument("--model", required=True, help="folder, hub name or run folder")
    flags.add_argument(
        "--prompts", required=True, help="{prompt} rows, or any records; also FILE#[:100]"
    )
    flags.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
    flags.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    flags.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    flags.add_argument("--top-p", type=float, default=1.0)
    flags.add_argument("--max-tokens", type=int, default=128, help="of a response")
    flags.add_argument("--stop", nargs="*", default=[], help="texts that end a response")
    flags.add_argument("--seed", type=int, default=0, help="of the draws")
    flags.add_argument("--most", type=int, help="prompts to take, from the first on")
    flags.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    flags.add_argument("--prompt-format", default="{prompt}", help="text around a plain prompt")
    flags.add_argument(
        "--chat", action="store_true", help="put plain prompts through the chat template"
    )
    flags.add_argument("--tokenizer", help="folder or hub name (default: the model's)")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return flags


def _row(record: PromptRecord, response: str, sample: int, samples: int) -> dict[str, Any]:
    """A line of the output; ids tell equal prompts and samples apart."""
    key = str(record.line) if samples == 1 else f"{record.line}.{sample}"
    return {"id": key, "prompt": record.prompt, "response": response}


def _begun(
    path: Path, settings: dict[str, Any], records: Sequence[PromptRecord], samples: int, batch: int
) -> int:
    """How many prompts an earlier command has finished, in whole batches; the rest is cut off.

    Whole batches alone make a resumed file the same as an uninterrupted one.

    Raises:
      UserError: the file was made with other settings or from other prompts.
    """
    beside = path.with_name(path.name + ".settings.json")
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return 0
    if not beside.exists():
        raise UserError(f"{path}: exists, and was not made by this command; name another --output")
    before = json.loads(beside.read_text(encoding="utf-8"))
    for name in settings:
        if before.get(name) != settings[name]:
            raise UserError(
                f"{path}: was made with {name} {before.get(name)!r}, not {settings[name]!r}; name "
                "another --output, or delete it"
            )
    lines = path.read_bytes().splitlines(keepends=True)
    whole = len(lines) - bool(lines and not lines[-1].endswith(b"\n"))
    done = min(whole // samples, len(records))
    if done < len(records):
        done -= done % batch
    kept = lines[: done * samples]
    for number, (line, record) in enumerate(zip(kept[::samples], records, strict=False)):
        if json.loads(line)["prompt"] != record.prompt:
            raise UserError(
                f"{path}:{number * samples + 1}: another prompt than {record.source}:"
                f"{record.line}; name another --output, or delete it"
            )
    if len(kept) < len(lines):
        path.write_bytes(b"".join(kept))
    return done


def _shown(batches: Sequence[int]) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(batches, description="batches", console=Console(stderr=True))
