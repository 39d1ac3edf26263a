"""Records of preferences, responses, labelled completions and texts, whatever they lie in."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxalign.data.embedded import embedded_preferences, embedded_responses, embedded_texts
from jaxalign.data.reading import (
    BadRecordError,
    BadRecords,
    ReadReport,
    Row,
    check_text,
    parse_json,
    read_rows,
    refuse,
)
from jaxalign.data.records import (
    Message,
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
    Text,
    TextRecord,
    UnpairedRecord,
    shared_length,
)
from jaxalign.errors import UserError

R = TypeVar("R")
P = TypeVar("P", PreferenceRecord, PromptRecord, PromptResponseRecord, UnpairedRecord, TextRecord)

COLUMNS = (
    *("form", "prompt", "chosen", "rejected", "response", "completion"),
    *("messages", "tools", "label", "text"),
)
"""Fields of a row that are looked at; a Parquet file's others are not read."""
ASSISTANT = "\n\nAssistant:"  # HH-RLHF's mark of an assistant turn
NOT_RESPONDING = frozenset({"user", "human", "system", "tool"})  # roles


def preference_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[PreferenceRecord]:
    r"""Preference pairs of a source, in order.

    Three forms are told apart row by row: prompt, chosen and rejected as text; conversations
    (lists of {role, content}) whose prompt is given or is what chosen and rejected share; and
    HH-RLHF's two transcripts, whose prompt is the longest common prefix that ends at an
    assistant turn ("\n\nAssistant:" included).

    Args:
      source: a file (.jsonl, .json, .parquet; .gz, .xz), a folder, `tfds:NAME`, a hub name, each
        with an optional `#train[:90%]`; or "embedded".
      bad_records: "error" stops at a row that cannot be used, "skip" counts it.
      report: filled while reading.

    Raises:
      UserError: names the file and line of the first bad record, or a missing source.
    """
    if source == "embedded":
        return iter(embedded_preferences())
    return read_records(source, lambda row: [preference_of_row(row)], bad_records, report)


def response_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[PromptResponseRecord]:
    """Prompts and responses to imitate: {prompt, response} or {prompt, completion}, {messages}
    whose last turn is the response, or preference pairs, whose chosen response is taken.

    Args:
      source: as for `preference_records`.
      bad_records: "error" or "skip".
      report: filled while reading.
    """  # noqa: D205
    if source == "embedded":
        return iter(embedded_responses())
    return read_records(source, lambda row: [_response(row)], bad_records, report)


def prompt_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[PromptRecord]:
    """Prompts to respond to: {prompt}, {messages} up to the last turn that is not a response, JSON
    strings, or the prompts of any other records.

    Args:
      source: as for `preference_records`.
      bad_records: "error" or "skip".
      report: filled while reading.
    """  # noqa: D205
    if source == "embedded":
        return (
            PromptRecord(prompt=record.prompt, source=record.source, line=record.line)
            for record in embedded_responses()
        )
    return read_records(source, lambda row: [_prompt(row)], bad_records, report)


def unpaired_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[UnpairedRecord]:
    """Labelled completions: {prompt, completion, label} with a label true or false.

    Args:
      source: as for `preference_records`; pairs give one liked and one disliked record each.
      bad_records: "error" or "skip".
      report: filled while reading.
    """
    if source == "embedded":
        return _as_unpaired(embedded_preferences())
    return read_records(source, _unpaired, bad_records, report)


def text_records(
    source: str, *, bad_records: BadRecords = "error", report: ReadReport | None = None
) -> Iterator[TextRecord]:
    """Documents: {text} rows, JSON strings, or whole text files.

    Args:
      source: as for `preference_records`, or a .txt file (one document).
      bad_records: "error" or "skip".
      report: filled while reading.
    """
    if source == "embedded":
        return iter(embedded_texts())
    return read_records(source, lambda row: [_text(row)], bad_records, report)


def chosen_responses(records: Iterable[PreferenceRecord]) -> Iterator[PromptResponseRecord]:
    """The preferred halves of pairs, for supervised fine-tuning."""
    for record in records:
        yield PromptResponseRecord(
            prompt=record.prompt, response=record.chosen, source=record.source, line=record.line
        )


def split_holdout(
    records: Iterable[P], fraction: float, *, seed: int = 0
) -> tuple[list[P], list[P]]:
    """Training and held-out records; all records of one prompt are on the same side.

    A prompt is held out where its hash falls under the fraction: adding or removing records moves
    no other record to the other side.

    Args:
      records: preference, response, unpaired or text records.
      fraction: share of prompts to hold out, in [0, 1).
      seed: another seed, another choice of prompts.

    Returns:
      (training records, held-out records), each in the order given.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"holdout: {fraction} is not in [0, 1)")
    sides: tuple[list[P], list[P]] = ([], [])
    for record in records:
        prompt = record.text if isinstance(record, TextRecord) else record.prompt
        content = json.dumps([seed, prompt], sort_keys=True, ensure_ascii=False).encode("utf-8")
        value = int.from_bytes(hashlib.sha256(content).digest()[:8]) / 2**64
        sides[value < fraction].append(record)
    return sides


def read_records(
    source: str,
    make: Callable[[Row], list[R]],
    bad_records: BadRecords = "error",
    report: ReadReport | None = None,
    columns: Collection[str] = COLUMNS,
) -> Iterator[R]:
    """Rows through `make`; a fault stops or is counted.

    Args:
      source: as for `preference_records`.
      make: the records of a row; raises a `BadRecordError`.
      bad_records: "error" or "skip".
      report: filled while reading.
      columns: fields that `make` looks at.

    Raises:
      UserError: names the file and line of the first bad record, or a source without records.
    """
    report = ReadReport() if report is None else report
    for row in read_rows(source, columns):
        report.read += 1
        try:
            if row.fault is not None:
                raise row.fault
            made = make(row)
        except BadRecordError as fault:
            refuse(row, fault, bad_records, report)
            continue
        yield from made
    if not report.kept:
        what = f"no usable record; {report.summary()}" if report.read else "no records in it"
        raise UserError(f"{source}: {what}")


def fields_of(row: Row) -> Mapping[str, Any]:
    """The row as a mapping; a builder of ours keeps conversations as JSON.

    Raises:
      BadRecordError: it is something else.
    """
    if row.fault is not None:
        raise row.fault
    if not isinstance(row.value, Mapping):
        raise BadRecordError(
            "wrong type", f"the record is a {type(row.value).__name__}, not an object with fields"
        )
    if row.value.get("form") != "messages":
        return row.value
    sides = ("prompt", "chosen", "rejected")
    try:
        return {
            key: parse_json(check_text(value, key)) if key in sides and value else value
            for key, value in row.value.items()
        }
    except BadRecordError as error:
        raise BadRecordError(
            "wrong type", f"form is messages, but a field is not turns as JSON text: {error}"
        ) from None


def _messages(value: Sequence[Any], name: str) -> list[Message]:
    """Turns of a conversation; what templates do not read (scores, identifiers) is dropped."""
    turns = []
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} of {name}"
        if not isinstance(turn, Mapping):
            raise BadRecordError("wrong type", f"{where} is not an object with role and content")
        calls, content = turn.get("tool_calls"), turn.get("content")
        for key in ("role", "content"):
            if turn.get(key) is None and not (key == "content" and calls):
                raise BadRecordError("missing field", f"{where} has no {key}")
        message = Message(
            role=check_text(turn["role"], f"role of {where}"),
            content=check_text("" if content is None else content, f"content of {where}"),
        )
        if calls:
            message["tool_calls"] = calls
        for key in ("name", "tool_call_id", "reasoning_content"):
            if turn.get(key) is not None:
                message[key] = check_text(turn[key], f"{key} of {where}")
        turns.append(message)
    return turns


def text_or_turns(value: Any, name: str) -> Text:
    """Text, or the turns of a conversation.

    Raises:
      BadRecordError: it is neither.
    """
    if isinstance(value, list | tuple):
        return _messages(value, name)
    return check_text(value, name)


def _required(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of the named fields that is there."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    present = ", ".join(map(str, fields)) or "none"
    raise BadRecordError("missing field", f"no {' or '.join(names)}; its fields are {present}")


def _response_text(value: Text, name: str) -> Text:
    """A response that says something, and that is not its reader's."""
    if isinstance(value, str):
        empty = not value.strip()
    else:
        empty = not any(turn["content"].strip() or turn.get("tool_calls") for turn in value)
    if empty:
        raise BadRecordError("empty response", f"{name} is empty")
    if not isinstance(value, str) and (role := value[-1]["role"]) in NOT_RESPONDING:
        raise BadRecordError("no response", f"the last turn of {name} is of role {role}")
    return value


def _prompt_text(value: Any, name: str = "prompt") -> Text:
    """Text, which may be empty, or at least one turn."""
    if isinstance(value, list | tuple) and not value:
        raise BadRecordError("missing field", f"{name} is a conversation without turns")
    return text_or_turns(value, name)


def _is_pair(fields: Mapping[str, Any]) -> bool:
    """Whether chosen and rejected are what counts; tables of several kinds fill up with nulls."""
    single = fields.get("response") is not None or fields.get("completion") is not None
    return fields.get("chosen") is not None or ("chosen" in fields and not single)


def preference_of_row(row: Row) -> PreferenceRecord:
    """The pair of a row, whichever of the three forms it has."""
    fields = fields_of(row)
    chosen = text_or_turns(_required(fields, "chosen"), "chosen")
    rejected = text_or_turns(_required(fields, "rejected"), "rejected")
    prompt = fields.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecordError("wrong type", "one of chosen and rejected is text, the other is turns")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None and ASSISTANT not in chosen:
            _required(fields, "prompt")
        if prompt is None:
            prompt, chosen, rejected = split_transcripts(chosen, rejected)
        prompt = _prompt_text(prompt)
    else:
        prompt, chosen, rejected = _split_conversations(prompt, chosen, rejected)
    if chosen == rejected:
        raise BadRecordError("identical responses", "chosen and rejected are the same")
    return PreferenceRecord(
        prompt=prompt,
        chosen=_response_text(chosen, "chosen"),
        rejected=_response_text(rejected, "rejected"),
        source=row.source,
        line=row.line,
    )


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""HH-RLHF's two dialogues as prompt and two responses.

    Returns:
      (prompt, chosen, rejected): the prompt is the longest common prefix that ends at an
      assistant turn, "\n\nAssistant:" included; the responses begin with the space after it.
    """
    shared = chosen[: shared_length(chosen, rejected)]
    end = shared.rfind(ASSISTANT)
    if end < 0:
        raise BadRecordError("no shared prompt", "chosen and rejected share no assistant turn")
    end += len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def _split_conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[Text, Text, Text]:
    """Prompt and responses of two conversations which may both begin with the prompt."""
    shared = shared_length(chosen, rejected)
    if isinstance(prompt, list | tuple) and prompt:
        given = _messages(prompt, "prompt")
        if given == chosen[: len(given)] and given == rejected[: len(given)]:
            return given, chosen[len(given) :], rejected[len(given) :]
        return given, chosen, rejected
    if shared == len(chosen) == len(rejected):
        raise BadRecordError("identical responses", "chosen and rejected are the same")
    if shared:
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt and not isinstance(prompt, str):
        raise BadRecordError("no shared prompt", "chosen and rejected share no first turn")
    return [Message(role="user", content=check_text(prompt, "prompt"))], chosen, rejected


def _response(row: Row) -> PromptResponseRecord:
    fields = fields_of(row)
    if fields.get("messages") is not None:
        turns = text_or_turns(fields["messages"], "messages")
        if isinstance(turns, str) or len(turns) < 2:
            raise BadRecordError("wrong type", "messages is not a list of two turns or more")
        prompt, response = turns[:-1], turns[-1:]
    elif _is_pair(fields):
        pair = preference_of_row(row)
        prompt, response = pair.prompt, pair.chosen
    else:
        prompt = _prompt_text(_required(fields, "prompt"))
        response = text_or_turns(_required(fields, "response", "completion"), "response")
    return PromptResponseRecord(
        prompt=prompt,
        response=_response_text(response, "response"),
        source=row.source,
        line=row.line,
    )


def _prompt(row: Row) -> PromptRecord:
    """A prompt that says something."""
    if isinstance(row.value, str):
        prompt: Text = check_text(row.value, "the prompt")
    elif _is_pair(fields := fields_of(row)):
        prompt = preference_of_row(row).prompt
    elif fields.get("prompt") is None and fields.get("messages") is not None:
        turns = _messages(fields["messages"], "messages")
        while turns and turns[-1]["role"] not in NOT_RESPONDING:
            turns.pop()
        prompt = turns
    else:
        prompt = _prompt_text(_required(fields, "prompt", "messages"))
    said = prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)
    if not said.strip():
        raise BadRecordError("empty prompt", "the prompt is empty")
    return PromptRecord(prompt=prompt, source=row.source, line=row.line)


def _as_unpaired(pairs: Iterable[PreferenceRecord]) -> Iterator[UnpairedRecord]:
    for pair in pairs:
        for completion, label in ((pair.chosen, True), (pair.rejected, False)):
            yield UnpairedRecord(
                prompt=pair.prompt,
                completion=completion,
                label=label,
                source=pair.source,
                line=pair.line,
            )


def _unpaired(row: Row) -> list[UnpairedRecord]:
    fields = fields_of(row)
    if _is_pair(fields):
        return list(_as_unpaired([preference_of_row(row)]))
    label = _required(fields, "label")
    if label not in (True, False):
        raise BadRecordError("wrong type", f"label is {label!r}, not true or false")
    completion = text_or_turns(_required(fields, "completion", "response"), "completion")
    return [
        UnpairedRecord(
            prompt=_prompt_text(_required(fields, "prompt")),
            completion=_response_text(completion, "completion"),
            label=bool(label),
            source=row.source,
            line=row.line,
        )
    ]


def _text(row: Row) -> TextRecord:
    value = row.value if isinstance(row.value, str) else _required(fields_of(row), "text")
    text = check_text(value, "text")
    if not text.strip():
        raise BadRecordError("empty text", "the text is empty")
    return TextRecord(text=text, source=row.source, line=row.line)
