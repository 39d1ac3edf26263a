"""Pairs and prompts of the study on a real chat model: the one place that reads and writes them.

UltraFeedback's labels are a large model's scores of other models' answers; its answers are cut to
the length that policies may write, for a policy's are cut too. In the pairs of "LLMs from scratch"
(Raschka) one of two short answers is the more polite. Annotators learn from every other pair, the
judge from the rest. PandaLM's labels are people's; no model learns from them, and only pairs whose
answers are short enough to be read as a whole are used.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ipo_md.small_options import Options
from experiments.runs import DATA
from jaxalign.data import PromptRecord, load_tokenizer, preference_records, tokenize_prompts
from jaxalign.data.tokenized import TokenizedRows
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.files import read_json, write_json, write_json_lines

TRAINED = {
    "ultrafeedback": DATA / "preferences" / "ultrafeedback_train.jsonl",
    "polite": DATA / "preferences" / "rasbt_instruction_preference.jsonl",
}
"""Sources of the pairs that annotators learn from."""
HELD_OUT = {
    "ultrafeedback": DATA / "preferences" / "ultrafeedback_eval.jsonl",
    "people": DATA / "judging" / "pandalm_human.jsonl",
}
"""Sources of held-out pairs alone."""
LONGEST = 240
"""Most characters of a prompt."""
POLITE = 8
"""One in so many polite pairs is held out."""

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of the sources, one after the other in turn.

    Attributes:
      annotators: pairs that the reward model and the preference model learn from.
      judge: pairs that the judge learns from.
      held_out: pairs that measure all three.
      prompts: that policies learn on; they are also those of pairs.
      unseen: prompts of held-out pairs, but people's.
    """

    annotators: list[Row]
    judge: list[Row]
    held_out: list[Row]
    prompts: list[Row]
    unseen: list[Row]


def prepare(options: Options) -> None:
    """Write pairs and prompts, if they are not there; the test prompts also beside the rows."""
    folder = Path(options.folder) / "data"
    names = ("pairs", "held_out", "longest", "tokens", "validation", "test")
    made = {name: getattr(options, name) for name in names} | {"model": options.model}
    file = folder / "prompts.json"
    if file.exists():
        own: Any = read_json(file, "prompts of the study")
        if own["made"] != made:
            sys.exit(f"{file} was made with {own['made']}, not {made}; set another --folder")
    else:
        data = split(load_tokenizer(options.model), options)
        number = options.validation + options.test
        if len(data.unseen) < number:
            sys.exit(f"--validation, --test: there are {len(data.unseen)} held-out prompts")
        unseen = data.unseen[:number]
        mixed = [unseen[at] for at in np.random.default_rng(0).permutation(number)]
        own = {"made": made, "train": data.prompts}
        own["validation"], own["test"] = mixed[: options.validation], mixed[options.validation :]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("annotators", "judge", "held_out"):
            write_json_lines(folder / f"{name}.jsonl", getattr(data, name))
        write_json(file, own)
        print(*(f"{len(x)} {name}" for name, x in vars(data).items()), sep=", ", flush=True)
    write_json_lines(Path(options.rows) / "prompts.jsonl", own["test"])


def split(tokenizer: Tokenizer, options: Options) -> Split:
    """Read all sources."""
    pairs = {name: _pairs(path, name, tokenizer, options.tokens) for name, path in TRAINED.items()}
    held_out = {
        name: _pairs(path, name, tokenizer, options.tokens) for name, path in HELD_OUT.items()
    }
    held_out["polite"] = pairs["polite"][::POLITE]
    pairs["polite"] = [row for number, row in enumerate(pairs["polite"]) if number % POLITE]

    def prompts(lists: Sequence[list[Row]]) -> list[Row]:
        fitting = []
        for rows in lists:
            own = [{"prompt": row["prompt"], "source": row["source"]} for row in rows]
            length = tokenized(own, tokenizer, longest=4 * LONGEST).length
            fitting.append([x for x, n in zip(own, length, strict=True) if n <= options.longest])
        return in_turn(fitting)

    return Split(
        annotators=in_turn([own[::2] for own in pairs.values()])[: options.pairs],
        judge=in_turn([own[1::2] for own in pairs.values()])[: options.pairs],
        held_out=[row for own in held_out.values() for row in own[: options.held_out]],
        prompts=prompts(list(pairs.values())),
        unseen=prompts([held_out["ultrafeedback"], held_out["polite"]]),
    )


def in_turn(lists: Sequence[Sequence[Row]]) -> list[Row]:
    """One row of each list after the other, and what is left of the longer ones."""
    return [row for row in chain.from_iterable(zip_longest(*lists)) if row is not None]


def _pairs(file: Path, source: str, tokenizer: Tokenizer, response: int) -> list[Row]:
    """Pairs of a file with short prompts, their responses cut; those then equal are left out."""
    rows = []
    for record in preference_records(str(file)):
        prompt, whole = str(record.prompt), [str(x) for x in (record.chosen, record.rejected)]
        sides = [cut(x, tokenizer, response) for x in whole]
        if source == "people" and sides != [x.strip() for x in whole]:
            continue  # people read all of it
        if len(prompt) <= LONGEST and sides[0] != sides[1] and all(sides):
            row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], "source": source}
            rows.append(row)
    return rows


def cut(text: str, tokenizer: Tokenizer, tokens: int) -> str:
    """The first tokens of a text."""
    own = tokenizer.encode(text, add_special_tokens=False)
    if len(own) <= tokens:
        return text.strip()
    kept = str(
        tokenizer.decode(own[:tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
    return kept.replace("\ufffd", "").strip()


def tokenized(prompts: Sequence[Row], tokenizer: Tokenizer, *, longest: int) -> TokenizedRows:
    """The prompts in the tokenizer's chat template, where it has one."""
    records = [
        PromptRecord(prompt=row["prompt"], source=row["source"], line=number)
        for number, row in enumerate(prompts, 1)
    ]
    return tokenize_prompts(records, tokenizer, max_length=longest)[0]
