"""From a row to a record: every supported form of pairs, responses, prompts, labels and texts."""

import json
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign.data.reading import BadRecordError, Row, check_text, parse_json
from jaxalign.data.records import (
    NOT_RESPONDING,
    RESPONDING,
    Conversation,
    Message,
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
    Text,
    TextRecord,
    UnpairedRecord,
    shared_length,
)

COLUMNS = (
    *("form", "prompt", "chosen", "rejected", "response", "completion"),
    *("messages", "tools", "system", "label", "score", "text"),
)
"""Fields of a row that are read; other columns of a Parquet file are not."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # HH-RLHF's marks of turns


def fields_of(row: Row) -> Mapping[str, Any]:
    """The row as a mapping; the builders of this package store conversations as JSON.

    Tables (Parquet, Arrow) have all columns for every turn and argument, filled with nulls, which
    are removed. Nulls in JSON files are kept: they were written on purpose.

    Raises:
      BadRecordError: the row is not a mapping.
    """
    if row.fault is not None:
        raise row.fault
    if not isinstance(row.value, Mapping):
        raise BadRecordError(
            "wrong type", f"the record is a {type(row.value).__name__}, not an object with fields"
        )
    if row.value.get("form") != "messages":
        is_json = re.search(r"\.jsonl?(\.gz|\.xz)?$", row.source)
        if is_json:
            return row.value
        return {name: _without_nulls(value) for name, value in row.value.items()}
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


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _messages(value: Any, name: str) -> list[Message]:
    """Turns of a conversation, without fields that templates do not read (scores, identifiers)."""
    if not isinstance(value, list | tuple):
        raise BadRecordError(
            "wrong type", f"{name} is a {type(value).__name__}, not a list of turns"
        )
    turns = []
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} of {name}"
        if not isinstance(turn, Mapping):
            raise BadRecordError("wrong type", f"{where} is not an object with role and content")
        calls, content = turn.get("tool_calls"), turn.get("content")
        for key in ("role", "content"):
            if turn.get(key) is None and not (key == "content" and calls):
                raise BadRecordError("missing field", f"{where} has no {key}")
        role = check_text(turn["role"], f"role of {where}")
        if role not in NOT_RESPONDING | RESPONDING:
            known = ", ".join(sorted(NOT_RESPONDING | RESPONDING))
            raise BadRecordError("unknown role", f"{where} is of role {role!r}; known are {known}")
        message = Message(
            role=role,
            content=check_text("" if content is None else content, f"content of {where}"),
        )
        if calls:
            message["tool_calls"] = _calls(calls, where)
        for key in ("name", "tool_call_id", "reasoning_content"):
            if turn.get(key) is not None:
                message[key] = check_text(turn[key], f"{key} of {where}")
        turns.append(message)
    return turns


def _decoded(value: Any) -> Any:
    """The value of a JSON text, also if it was encoded twice; other values unchanged."""
    while isinstance(value, str):
        value = json.loads(value) if value.strip() else {}
    return value


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls, the arguments of each as a mapping, which templates format."""
    try:
        calls = _decoded(calls)
        found = []
        for call in calls:
            inner = call.get("function")
            function = call if inner is None else inner
            arguments = _decoded(function.get("arguments") or {})
            if not isinstance(arguments, Mapping):
                raise TypeError
            function = {**function, "arguments": arguments}
            found.append(function if inner is None else {**call, "function": function})
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise BadRecordError(
            "wrong type",
            f"tool_calls of {where}: not a list of {{function: {{name, arguments}}}} whose "
            "arguments are an object, or one as JSON text",
        ) from None
    return found


def _with_columns(prompt: Text, fields: Mapping[str, Any]) -> Text:
    """A prompt with the system turn and the tools of other columns."""
    try:
        tools = _decoded(fields.get("tools")) or []
        tools = [_decoded(tool) for tool in tools]
        if not all(isinstance(tool, Mapping) for tool in tools):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise BadRecordError(
            "wrong type", "tools is not a list of schemas, nor such a list as JSON text"
        ) from None
    system = fields.get("system")
    system = "" if system is None else check_text(system, "system")
    if not tools and not system.strip():
        return prompt
    text = prompt if isinstance(prompt, str) else None
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if system.strip():
        own = turns[0]["content"] if turns[0]["role"] == "system" else None
        if own is None:
            turns = [Message(role="system", content=system), *turns]
        elif own.strip() != system.strip():
            raise BadRecordError(
                "two system turns", "the system turn of the prompt differs from the column system"
            )
    return Conversation(turns, tools=tools, text=text)


def text_or_turns(value: Any, name: str) -> Text:
    """Text, or the turns of a conversation.

    Raises:
      BadRecordError: the value is neither.
    """
    if isinstance(value, list | tuple):
        return _messages(value, name)
    return check_text(value, name)


def _required(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of the named fields that is present."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    present = ", ".join(map(str, fields)) or "none"
    raise BadRecordError("missing field", f"no {' or '.join(names)}; its fields are {present}")


def _response_text(value: Text, name: str) -> Text:
    """A response, checked not to be empty and not to begin or end with a turn of the user."""
    if isinstance(value, str):
        empty = not value.strip()
    else:
        empty = not any(turn["content"].strip() or turn.get("tool_calls") for turn in value)
    if empty:
        raise BadRecordError("empty response", f"{name} is empty")
    if not isinstance(value, str):
        for which, turn in (("last", value[-1]), ("first", value[0])):
            if turn["role"] in NOT_RESPONDING:
                raise BadRecordError(
                    "no response", f"the {which} turn of {name} is of role {turn['role']}"
                )
    return value


def _prompt_text(value: Any, name: str = "prompt") -> Text:
    """A prompt: text, which may be empty, or at least one turn."""
    if isinstance(value, list | tuple) and not value:
        raise BadRecordError("missing field", f"{name} is a conversation without turns")
    return text_or_turns(value, name)


def _is_pair(fields: Mapping[str, Any]) -> bool:
    """Whether the row is a pair; tables of several kinds of rows are filled with nulls."""
    single = fields.get("response") is not None or fields.get("completion") is not None
    return fields.get("chosen") is not None or ("chosen" in fields and not single)


def preference_of_row(row: Row) -> PreferenceRecord:
    """The pair of a row in any of the three forms."""
    fields = fields_of(row)
    chosen = text_or_turns(_required(fields, "chosen"), "chosen")
    rejected = text_or_turns(_required(fields, "rejected"), "rejected")
    prompt = fields.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None and ASSISTANT not in chosen:
            _required(fields, "prompt")
        prompt, chosen, rejected = _split_texts(prompt, chosen, rejected)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRecordError("wrong type", "one of chosen and rejected is text, the other is turns")
    else:
        prompt, chosen, rejected = _split_conversations(prompt, chosen, rejected)
    if chosen == rejected:
        raise BadRecordError("identical responses", "chosen and rejected are the same")
    return PreferenceRecord(
        prompt=_with_columns(prompt, fields),
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


def _split_texts(prompt: Any, chosen: str, rejected: str) -> tuple[Text, str, str]:
    """Prompt and responses of two texts, which may be dialogues that include their prompt."""
    dialogues = all(
        text.lstrip().startswith(HUMAN.strip()) and ASSISTANT in text for text in (chosen, rejected)
    )
    if prompt is None:
        return split_transcripts(chosen, rejected)
    if not dialogues or not isinstance(prompt, str):
        return _prompt_text(prompt), chosen, rejected
    shared, first, second = split_transcripts(chosen, rejected)
    if prompt.strip() not in shared:
        raise BadRecordError("another prompt", REPEATED)
    return shared, first, second


REPEATED = (
    "chosen and rejected are whole conversations that do not contain the prompt; remove the "
    "prompt, or give the responses alone"
)


def _split_conversations(
    prompt: Any, chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[Text, Sequence[Message], Sequence[Message]]:
    """Prompt and responses of two conversations which may both begin with the prompt."""
    if not chosen or not rejected:
        raise BadRecordError("empty response", "chosen or rejected is a list without turns")
    shared = shared_length(chosen, rejected)
    begun = list(chosen[:shared])
    given = _messages(prompt, "prompt") if isinstance(prompt, list | tuple) else []
    if given and begun[: len(given)] == given:
        return given, chosen[len(given) :], rejected[len(given) :]
    if shared == len(chosen) == len(rejected):
        raise BadRecordError("identical responses", "chosen and rejected are the same")
    asking = [side[0]["role"] for side in (chosen, rejected) if side[0]["role"] in NOT_RESPONDING]
    if not asking and given:
        return given, chosen, rejected
    if not asking and not given and (prompt or (isinstance(prompt, str) and not shared)):
        return [Message(role="user", content=check_text(prompt, "prompt"))], chosen, rejected
    if not shared:
        begins = f", and one begins with a turn of role {asking[0]}" if asking else ""
        raise BadRecordError("no shared prompt", f"chosen and rejected share no first turn{begins}")
    if given:
        held = any(begun[at : at + len(given)] == given for at in range(shared))
    else:
        said = check_text(prompt, "prompt").strip() if prompt else ""
        held = not said or any(said == turn["content"].strip() for turn in begun)
    if not held:
        raise BadRecordError("another prompt", REPEATED)
    return begun, chosen[shared:], rejected[shared:]


def _alone(prompt: Text, response: Text) -> tuple[Text, Text]:
    """Prompt and response; the prompt is removed from a conversation that begins with it."""
    given = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if not isinstance(response, str) and list(response[: len(given)]) == given:
        return given, response[len(given) :]
    return prompt, response


def response_of_row(row: Row) -> PromptResponseRecord:
    """A prompt and the response to imitate; of a pair, the chosen one."""
    fields = fields_of(row)
    if fields.get("messages") is not None:
        turns = _messages(fields["messages"], "messages")
        if len(turns) < 2:
            raise BadRecordError("wrong type", "messages is not a list of two turns or more")
        prompt, response = turns[:-1], turns[-1:]
    elif _is_pair(fields):
        pair = preference_of_row(row)
        return PromptResponseRecord(
            prompt=pair.prompt, response=pair.chosen, source=row.source, line=row.line
        )
    else:
        prompt = _prompt_text(_required(fields, "prompt"))
        response = text_or_turns(_required(fields, "response", "completion"), "response")
        prompt, response = _alone(prompt, response)
    return PromptResponseRecord(
        prompt=_with_columns(prompt, fields),
        response=_response_text(response, "response"),
        source=row.source,
        line=row.line,
    )


def prompt_of_row(row: Row, *, keep_fields: bool = False) -> PromptRecord:
    """A prompt that is not empty.

    Args:
      row: a text, or fields.
      keep_fields: whether the record keeps all fields of the row.
    """
    fields: Mapping[str, Any] = {} if isinstance(row.value, str) else fields_of(row)
    kept = dict(fields) if keep_fields else {}
    if isinstance(row.value, str):
        prompt: Text = check_text(row.value, "the prompt")
    elif _is_pair(fields):
        prompt, fields = preference_of_row(row).prompt, {}
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
    return PromptRecord(
        prompt=_with_columns(prompt, fields), source=row.source, line=row.line, fields=kept
    )


def as_unpaired(pairs: Iterable[PreferenceRecord]) -> Iterator[UnpairedRecord]:
    """One desirable and one undesirable record per pair."""
    for pair in pairs:
        for completion, label in ((pair.chosen, True), (pair.rejected, False)):
            yield UnpairedRecord(
                prompt=pair.prompt,
                completion=completion,
                label=label,
                source=pair.source,
                line=pair.line,
            )


def unpaired_of_row(row: Row, *, threshold: float | None = None) -> list[UnpairedRecord]:
    """A labelled completion, or the two of a pair.

    Args:
      row: with the fields prompt, completion or response, and label or score.
      threshold: smallest number that is desirable; None: labels are true or false, 1 or 0.
    """
    fields = fields_of(row)
    if _is_pair(fields):
        return list(as_unpaired([preference_of_row(row)]))
    label = _required(fields, "label", "score")
    said = f"label is {reprlib.repr(label)}"
    if not isinstance(label, bool) and threshold is not None:
        if not isinstance(label, int | float) or not abs(label) <= sys.float_info.max:
            raise BadRecordError("wrong type", f"{said}, not a finite number")
        label = label >= threshold
    elif label not in (True, False):
        raise BadRecordError("wrong type", f"{said}, not true or false; numbers need a threshold")
    completion = text_or_turns(_required(fields, "completion", "response"), "completion")
    prompt, completion = _alone(_prompt_text(_required(fields, "prompt")), completion)
    return [
        UnpairedRecord(
            prompt=_with_columns(prompt, fields),
            completion=_response_text(completion, "completion"),
            label=bool(label),
            source=row.source,
            line=row.line,
        )
    ]


def text_of_row(row: Row) -> TextRecord:
    """A document: a row of text, or the field `text`."""
    value = row.value if isinstance(row.value, str) else _required(fields_of(row), "text")
    text = check_text(value, "text")
    if not text.strip():
        raise BadRecordError("empty text", "the text is empty")
    return TextRecord(text=text, source=row.source, line=row.line)
