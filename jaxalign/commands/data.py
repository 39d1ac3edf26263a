"""`jaxalign data SOURCE [SOURCE ...] --tokenizer T`: what a run would see of its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxalign.config import AtLeastOne, Count, Range
from jaxalign.data import load_tokenizer
from jaxalign.data.card import Reading, data_cards
from jaxalign.data.mixtures import weighted_sources
from jaxalign.data.written import input_files
from jaxalign.errors import UserError
from jaxalign.files import check_output
from jaxalign.flags import BadRecords, Chat, parse
from jaxalign.reporting import print_table
from jaxalign.reporting.data_card import WRITTEN, card_rows, print_examples, write_card


@dataclass(frozen=True, kw_only=True)
class Options:
    """A data card: rows and what is wrong with them, lengths in tokens, truncation, duplicates,
    length bias, padding, scripts, and examples as the chat template renders them, with the scored
    tokens marked. Several sources are a mixture, each in a column.
    """  # noqa: D205

    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...]")
    ]
    """Preference pairs, responses or labelled responses, as --data of `jaxalign train`, each with
    an optional :WEIGHT."""
    tokenizer: str
    """Tokenizer: folder, Hub name or GGUF file."""
    output: Path | None = None
    """Folder for the page (index.html), the figure (card.png) and the numbers (card.json); None:
    only print."""
    kind: Literal["auto", "pairs", "responses", "labelled"] = "auto"
    """Kind of the records; auto: that of the first row of each source."""
    max_length: Annotated[int, Range("[2, inf)")] = 256
    """Largest number of tokens in prompt and response together."""
    batch_size: AtLeastOne = 8
    """Number of examples in a batch, for the fraction of padding."""
    turns: Literal["last", "all"] = "last"
    """Which turns of responses to imitate are scored, as --sft.turns of `jaxalign train`."""
    end_token: bool = True
    """Whether the end-of-sequence token follows responses."""
    threshold: Annotated[float, Range("[0, inf)")] | None = None
    """Smallest number that is a desirable label, as --feedback.threshold of `jaxalign train`; None:
    labels are true or false, 1 or 0."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt."""
    chat: Chat = "auto"
    """Whether plain prompts go through the tokenizer's chat template, as a user's turn."""
    bad_records: BadRecords = "skip"
    """Response to a record that cannot be used: skip and count it, or stop and name its line."""
    limit: AtLeastOne | None = None
    """Largest number of records of a source, counted from the first; None: all."""
    examples: Count = 1
    """Number of examples of each source to show."""


def main(arguments: Sequence[str]) -> int:
    """Print the card, and write it."""
    options = parse(Options, "data", arguments)
    if not options.sources:
        raise UserError("the following arguments are required: SOURCE; see jaxalign data --help")
    sources = weighted_sources(options.sources, "SOURCE")
    if options.output is not None:
        read = input_files(*options.sources)
        check_output(options.output, "--output", folder=True, files=WRITTEN, inputs=read)
    reading = Reading(
        tokenizer=load_tokenizer(options.tokenizer),
        max_length=options.max_length,
        batch_size=options.batch_size,
        prompt_format=options.prompt_format,
        chat=options.chat,
        turns=options.turns,
        threshold=options.threshold,
        end_token=options.end_token,
        bad_records=options.bad_records,
        max_records=options.limit,
        examples=options.examples,
    )
    cards = data_cards(sources, reading, None if options.kind == "auto" else options.kind)
    size = {"max_length": options.max_length, "batch_size": options.batch_size}
    print_table(["", *(card.label for card in cards)], card_rows(cards, **size))
    for card in cards:
        print_examples(card)
        for note in card.notes:
            print(f"{card.label}: {note}")
    if options.output is not None:
        numbers, image, page = write_card(cards, options.output, **size)
        print(f"numbers: {numbers}\nfigure: {image}\npage: {page}")
    return 0
