"""Input of a model with a scalar head: a prompt with one response, or with two."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxalign.data.record_index import IndexedRecords
from jaxalign.data.records import PreferenceRecord, Text
from jaxalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScoreFormat:
    """How prompts and responses become the rows of a scored model; stored in its config.json."""

    kind: Literal["reward", "preference"]
    """A response's reward, or the log-odds that the first of two responses is preferred."""
    max_length: int
    """Most tokens of a row; prompts lose their beginning."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt."""
    comparison_format: str = ""
    """Text after the prompt of a comparison, with {first} and {second}."""
    strings_as_chat: bool = False
    """Whether plain prompts are put through the tokenizer's chat template, too."""
    end_token: bool = True
    """Whether the end-of-sequence token follows a response."""
    whole_conversation: bool = False
    """Whether a row is the conversation exactly as the chat template renders it, as the cards of
    most reward models do. Otherwise a response ends with its end-of-turn token."""
    reward_bias: float = 0.0
    """Subtracted from rewards, so that good responses have about 0."""

    @property
    def rule(self) -> str:
        """A description of how rows end."""
        if self.whole_conversation:
            return "conversations as the chat template writes them, scored at their last token"
        end = "their end-of-sequence token" if self.end_token else "their last token"
        return f"prompt and response, scored at {end}"

    @property
    def tokenize_options(self) -> dict[str, Any]:
        """The options of `tokenize_pairs` and `tokenize_responses`."""
        options: dict[str, Any] = {
            "max_length": self.max_length,
            "prompt_format": self.prompt_format,
            "chat": "always" if self.strings_as_chat else "never",
            "end_token": self.end_token,
        }
        if self.kind == "preference":  # two responses: they displace the prompt sooner
            options["min_prompt_length"] = max(self.max_length // 8, 1)
        return options


def read_format(fields: dict[str, Any], place: str) -> ScoreFormat:
    """The format in a config.json.

    Raises:
      UserError: unknown or missing fields, or an unknown kind.
    """
    known = {field.name for field in dataclasses.fields(ScoreFormat)}
    unknown, missing = sorted(set(fields) - known), {"kind", "max_length"} - set(fields)
    if unknown or missing or fields["kind"] not in ("reward", "preference"):
        raise UserError(
            f"{place}: jaxalign: not the format of a scored model "
            f"({', '.join([*unknown, *sorted(missing)]) or fields['kind']}); train it again"
        )
    return ScoreFormat(**fields)


def comparison(comparison_format: str, first: str, second: str) -> str:
    """The text of two responses side by side; their own braces are kept."""
    texts = {"first": first, "second": second}
    return re.sub(r"\{(first|second)\}", lambda found: texts[found[1]], comparison_format)


def compared(
    records: Iterable[PreferenceRecord], comparison_format: str
) -> Iterable[PreferenceRecord]:
    """Pairs whose sides are the two orders of a comparison: the chosen response first, then last.

    Those of records that stay on disk are made when they are read.

    Raises:
      UserError: a response is a conversation of several turns.
    """
    make = functools.partial(_compared, comparison_format=comparison_format)
    return records.map(make) if isinstance(records, IndexedRecords) else map(make, records)


def _compared(record: PreferenceRecord, comparison_format: str) -> PreferenceRecord:
    place = f"{record.source}:{record.line}"
    chosen, rejected = (_plain(text, place) for text in (record.chosen, record.rejected))
    return dataclasses.replace(
        record,
        chosen=comparison(comparison_format, chosen, rejected),
        rejected=comparison(comparison_format, rejected, chosen),
    )


def _plain(response: Text, place: str) -> str:
    if isinstance(response, str):
        return response
    if len(response) != 1:
        raise UserError(
            f"{place}: a response of {len(response)} turns; a comparison holds single answers, "
            "move earlier turns into the prompt"
        )
    return response[0]["content"]
