"""Pairs and prompts of the study on a real chat model: UltraFeedback, and polite answers.

UltraFeedback's labels are a large model's scores of other models' answers; its answers are cut to
the length that policies may write, for a policy's are cut too. In the pairs of "LLMs from scratch"
(Raschka) one of two short answers is the more polite. Annotators learn from every other pair, the
judge from the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from experiments.gradient_entanglement.runs import DATA
from jaxalign.data import PromptRecord, preference_records, tokenize_prompts
from jaxalign.data.tokenized import TokenizedRows
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.files import write_json_lines

PREFERENCES = DATA / "preferences"
SOURCES = ("ultrafeedback", "polite")
LONGEST = {"pair": 600, "prompt": 240}
"""Most characters of the prompts of pairs, and of the prompts that policies answer."""
HELD_OUT = 8
"""One in so many polite pairs is held out; UltraFeedback has held-out pairs of its own."""

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows of both sources, one after the other in turn.

    Attributes:
      annotators: pairs that the reward model and the preference model learn from.
      judge: pairs that the judge learns from.
      held_out: pairs that measure all three.
      prompts: that policies learn on; they are also those of short pairs.
      unseen: prompts of held-out pairs.
    """

    annotators: list[Row]
    judge: list[Row]
    held_out: list[Row]
    prompts: list[Row]
    unseen: list[Row]


def split(tokenizer: Tokenizer, *, response: int) -> Split:
    """Read both sources.

    Args:
      tokenizer: of the policy.
      response: tokens to which responses are cut.
    """
    polite = _pairs("rasbt_instruction_preference", "polite", tokenizer, response)
    train = {
        "ultrafeedback": _pairs("ultrafeedback_train", "ultrafeedback", tokenizer, response),
        "polite": [row for number, row in enumerate(polite) if number % HELD_OUT],
    }
    held_out = {
        "ultrafeedback": _pairs("ultrafeedback_eval", "ultrafeedback", tokenizer, response),
        "polite": polite[::HELD_OUT],
    }

    def prompts(pairs: dict[str, list[Row]]) -> list[Row]:
        return in_turn(
            [
                [{"prompt": row["prompt"], "source": row["source"]} for row in own if _short(row)]
                for own in pairs.values()
            ]
        )

    return Split(
        annotators=in_turn([train[source][::2] for source in SOURCES]),
        judge=in_turn([train[source][1::2] for source in SOURCES]),
        held_out=in_turn([held_out[source] for source in SOURCES]),
        prompts=prompts(train),
        unseen=prompts(held_out),
    )


def in_turn(lists: Sequence[Sequence[Row]]) -> list[Row]:
    """One row of each list after the other, and what is left of the longer ones."""
    return [row for row in chain.from_iterable(zip_longest(*lists)) if row is not None]


def _short(row: Row) -> bool:
    return len(row["prompt"]) <= LONGEST["prompt"]


def _pairs(file: str, source: str, tokenizer: Tokenizer, response: int) -> list[Row]:
    """Pairs of a file with short prompts, their responses cut; those then equal are left out."""
    rows = []
    for record in preference_records(str(PREFERENCES / f"{file}.jsonl")):
        prompt = str(record.prompt)
        sides = [cut(str(x), tokenizer, response) for x in (record.chosen, record.rejected)]
        if len(prompt) <= LONGEST["pair"] and sides[0] != sides[1] and all(sides):
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


def write(data: Split, folder: Path) -> dict[str, Path]:
    """Write the pairs as JSON Lines; returns the files by name."""
    names = ("annotators", "judge", "held_out")
    paths = {name: folder / f"{name}.jsonl" for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        write_json_lines(path, getattr(data, name))
    return paths


def tokenized(prompts: Sequence[Row], tokenizer: Tokenizer, *, longest: int) -> TokenizedRows:
    """The prompts in the tokenizer's chat template, where it has one."""
    records = [
        PromptRecord(prompt=row["prompt"], source=row["source"], line=number)
        for number, row in enumerate(prompts, 1)
    ]
    return tokenize_prompts(records, tokenizer, max_length=longest)[0]
