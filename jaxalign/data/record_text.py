"""The text of records: chat templates for conversations, a format for plain prompts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.data.chat_templates import ChatTemplate, find_template, reads, render, unset_variables
from jaxalign.data.plain_prompts import Chat, PlainPrompts, plain_prompts
from jaxalign.data.records import (
    ASKING,
    Conversation,
    Message,
    Text,
    plain_text,
    shared_length,
    tools_of,
)
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError, notice_once

PROBES = "Yes", "No"
"""Two responses without a common character: where their renderings differ, responses begin."""


@dataclass(frozen=True, kw_only=True)
class RecordText:
    """A prompt and the responses to it as texts."""

    prompt: str
    """The same for all responses of a record."""
    responses: tuple[str, ...]
    differs: bool
    """Whether the template renders the prompt differently when no response follows."""
    asking: int = 0
    """Number of responses with a turn of the user or the system."""


@dataclass(frozen=True, kw_only=True)
class TextOf:
    """How records become text: templates for conversations, a format for plain prompts."""

    tokenizer: Tokenizer
    prompt_format: str
    chat_template: str | None
    plain: PlainPrompts
    special: frozenset[str]
    unread: set[str] = field(default_factory=set)
    """Fields of the conversations so far that their template ignores."""
    templates: set[ChatTemplate] = field(default_factory=set)
    """Templates used so far."""
    plain_seen: Counter[bool] = field(default_factory=Counter)
    """Number of plain prompts so far that the template rendered (True), and of others (False)."""

    def __call__(self, prompt: Text, responses: Sequence[Text], place: str) -> RecordText:
        """The texts of a record.

        The boundary is the end of the rendered prompt, if the template renders it the same before
        any response. Otherwise (a generation prompt that opens <think>, earlier thoughts that are
        removed) it is the end of the common prefix of two renderings with different responses.

        Args:
          prompt: text or conversation.
          responses: texts or turns.
          place: file and line, for messages.

        Raises:
          UserError: there is no template for a conversation, the template fails, or it renders
            the prompt differently before one of the responses.
        """
        texts = [response for response in responses if isinstance(response, str)]
        if len(texts) == len(responses) and (plain := self._plain(prompt)) is not None:
            begun = self.prompt_format.replace("{prompt}", plain)
            return RecordText(prompt=begun, responses=tuple(texts), differs=False)
        before, tools = _turns(prompt, "user"), tools_of(prompt)
        template = self._template(before, tools, place)
        begun = self._render(template, before, tools, place, add_generation_prompt=True)
        sides = [
            self._response(template, before, response, begun, tools, place)
            for response in responses
        ]
        prompts = {prompt for prompt, _ in sides}
        if len(prompts) > 1:
            raise UserError(
                f"{place}: {template.label} renders another prompt before each of the responses; "
                "their first turns need the same role"
            )
        (own,) = prompts
        asking = [any(turn["role"] in ASKING for turn in _turns(one, "")) for one in responses]
        return RecordText(
            prompt=own,
            responses=tuple(text for _, text in sides),
            differs=own != begun,
            asking=sum(asking),
        )

    def _response(
        self,
        template: ChatTemplate,
        before: Sequence[Message],
        response: Text,
        begun: str,
        tools: Sequence[Any],
        place: str,
    ) -> tuple[str, str]:
        """The rendered prompt before a response of this role, and the rendered response."""
        after = _turns(response, "assistant")
        self._note(template, after, ())
        probes = (Message(role=after[0]["role"], content=content) for content in PROBES)
        shown = (self._render(template, [*before, probe], tools, place) for probe in probes)
        own, first = begun, next(shown)
        if not first.startswith(begun):
            second = next(shown)
            own = first[: shared_length(first, second)]
            if not all(
                text[len(own) :].lower().startswith(content.lower())
                for text, content in zip((first, second), PROBES, strict=True)
            ):
                raise UserError(
                    f"{place}: {template.label} renders no common text before all responses; "
                    "give another template"
                )
        whole = self._render(template, [*before, *after], tools, place)
        if not whole.startswith(own):
            raise UserError(
                f"{place}: {template.label} renders the prompt differently before this response "
                "than before others; remove the record, or give another template"
            )
        return own, self._without_trailing_space(whole[len(own) :])

    def prompt(self, prompt: Text, place: str) -> str:
        """The rendered prompt, which a response continues."""
        if (plain := self._plain(prompt)) is not None:
            return self.prompt_format.replace("{prompt}", plain)
        turns, tools = _turns(prompt, "user"), tools_of(prompt)
        template = self._template(turns, tools, place)
        return self._render(template, turns, tools, place, add_generation_prompt=True)

    def whole(self, prompt: Text, response: Text, place: str) -> str:
        """A whole conversation as its template renders it."""
        turns, tools = [*_turns(prompt, "user"), *_turns(response, "assistant")], tools_of(prompt)
        return self._render(self._template(turns, tools, place), turns, tools, place)

    def _plain(self, prompt: Text) -> str | None:
        """The prompt, if it is not rendered by a template; else None."""
        plain = plain_text(prompt)
        if plain is None:
            return None
        self.plain_seen[self.plain.as_turns] += 1
        if self.plain.line is not None:
            notice_once(self.plain.line)
        if self.plain.as_turns:
            return None
        if isinstance(prompt, Conversation):
            self.unread.update({"system"} if prompt[0]["role"] == "system" else ())
            self.unread.update({"tools"} if prompt.tools else ())
        return plain

    def _template(self, turns: Sequence[Message], tools: Sequence[Any], place: str) -> ChatTemplate:
        template = find_template(self.tokenizer, self.chat_template, tools=bool(tools))
        if template is None:
            raise UserError(
                f"{place}: a conversation, but the tokenizer has no chat template; "
                "name one, or give prompt, chosen and rejected as text"
            )
        self._note(template, turns, tools)
        return template

    def _note(self, template: ChatTemplate, turns: Sequence[Message], tools: Sequence[Any]) -> None:
        names = {name for turn in turns for name in turn} | ({"tools"} if tools else set())
        self.unread.update(name for name in names if not reads(template, name))
        self.templates.add(template)

    def plain_prompt_notes(self) -> list[str]:
        """How plain prompts were rendered, if there were any and a rule decided it."""
        return [self.plain.line] if self.plain.line and self.plain_seen else []

    def notes(self) -> list[str]:
        """Warnings about fields and variables of the templates, one line for each kind."""
        found = (unset_variables(template, self.tokenizer) for template in self.templates)
        unset = sorted({name for names in found for name in names})
        notes = []
        if self.unread:
            notes.append(f"not read by the chat template: {', '.join(sorted(self.unread))}")
        if unset:
            notes.append(f"read by the chat template, but not set: {', '.join(unset)}")
        return notes

    def _render(
        self,
        template: ChatTemplate,
        turns: Sequence[Message],
        tools: Sequence[Any],
        place: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        return render(
            template,
            self.tokenizer,
            turns,
            place,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    def _without_trailing_space(self, text: str) -> str:
        """The text up to its end-of-turn token; templates often add a newline after it."""
        stripped = text.rstrip()
        return stripped if any(stripped.endswith(token) for token in self.special) else text


def _turns(text: Text, role: str) -> list[Message]:
    return [Message(role=role, content=text)] if isinstance(text, str) else list(text)


def text_of(
    tokenizer: Tokenizer, prompt_format: str, chat_template: str | None, chat: Chat
) -> TextOf:
    """How records become text with a tokenizer and these options; see `plain_prompts`."""
    if "{prompt}" not in prompt_format:
        raise UserError(f"prompt_format: {prompt_format!r} must contain {{prompt}}")
    return TextOf(
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        chat_template=chat_template,
        plain=plain_prompts(
            tokenizer, chat, prompt_format=prompt_format, chat_template=chat_template
        ),
        special=frozenset(tokenizer.all_special_tokens) | {"<|im_end|>", "<end_of_turn>"},
    )
