"""The text of records: chat templates for conversations, a format for plain prompts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from jaxalign.data.chat_templates import (
    ChatTemplate,
    find_template,
    marks_assistant,
    reads,
    render,
    render_marked,
    unset_variables,
)
from jaxalign.data.plain_prompts import Chat, PlainPrompts, plain_prompts
from jaxalign.data.records import (
    NOT_RESPONDING,
    Conversation,
    Message,
    Text,
    plain_text,
    shared_length,
    tools_of,
)
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import RecordError, UserError, notice_once

PROBES = "Yes", "No"
"""Two responses without a common character: where their renderings differ, responses begin."""
END_OF_TURN = frozenset(
    {"<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>"}
)
"""Tokens that end a turn, besides the end-of-sequence token."""
Turns = Literal["last", "all"]
"""Which turns of a conversation are responses: the last, or all of the assistant."""
Spans: TypeAlias = tuple[tuple[int, int], ...]
"""Parts of a text: of each, the number of its first character and of the first after it."""


@dataclass(frozen=True, kw_only=True)
class RecordText:
    """A prompt and the responses to it as texts."""

    prompt: str
    """The same for all responses of a record."""
    responses: tuple[str, ...]
    differs: bool
    """Whether the template renders the prompt differently when no response follows."""
    spans: tuple[Spans | None, ...]
    """The parts of each response that the assistant wrote; None: all of it."""


@dataclass(frozen=True, kw_only=True)
class TextOf:
    """How records become text: templates for conversations, a format for plain prompts."""

    tokenizer: Tokenizer
    chat_template: str | None
    plain: PlainPrompts
    special: frozenset[str]
    unread: set[str] = field(default_factory=set)
    """Fields of the conversations so far that their template ignores."""
    templates: set[ChatTemplate] = field(default_factory=set)
    """Templates used so far."""
    plain_seen: Counter[bool] = field(default_factory=Counter)
    """Number of plain prompts so far that the template rendered (True), and of others (False)."""

    def __call__(
        self, prompt: Text, responses: Sequence[Text], place: str, *, turns: Turns = "last"
    ) -> RecordText:
        """The texts of a record.

        The boundary is the end of the rendered prompt, if the template renders it the same before
        any response. Otherwise (a generation prompt that opens <think>, earlier thoughts that are
        removed) it is the end of the common prefix of two renderings with different responses.

        Of responses of several turns, those of the assistant are scored: what the template has in
        {% generation %} blocks, or else what it adds for each of these turns. Of a pair, turns that
        both sides begin with are not scored.

        Args:
          prompt: text or conversation.
          responses: texts or turns.
          place: file and line, for messages.
          turns: "all": the assistant's turns in the prompt are part of the response, too.

        Raises:
          UserError: there is no template for a conversation, the template fails, it renders
            the prompt differently before one of the responses, or earlier turns differently
            before later ones.
        """
        texts = [response for response in responses if isinstance(response, str)]
        if len(texts) == len(responses) and (plain := self._plain(prompt)) is not None:
            begun = self.plain.prompt_format.replace("{prompt}", plain)
            whole = (None,) * len(texts)
            return RecordText(prompt=begun, responses=tuple(texts), differs=False, spans=whole)
        before, tools = _turns(prompt, "user"), tools_of(prompt)
        after = [_turns(response, "assistant") for response in responses]
        if turns == "all":
            first = next((at for at, turn in enumerate(before) if _responds(turn)), len(before))
            after = [before[first:] + own for own in after]
            before = before[:first]
        template = self._template(before, tools, place)
        begun = self._render(template, before, tools, place, add_generation_prompt=True)
        sides = [self._response(template, before, own, begun, tools, place) for own in after]
        prompts = {prompt for prompt, _ in sides}
        if len(prompts) > 1:
            raise RecordError(
                f"{place}: {template.label} renders another prompt before each of the responses; "
                "their first turns need the same role"
            )
        (own,) = prompts
        found = RecordText(
            prompt=own,
            responses=tuple(text for _, text in sides),
            differs=own != begun,
            spans=tuple(
                self._spans(template, before, each, len(own), len(text), tools, place)
                for each, (_, text) in zip(after, sides, strict=True)
            ),
        )
        self._count_turn(prompt)
        return found if all(spans is None for spans in found.spans) else _from_first_scored(found)

    def _response(
        self,
        template: ChatTemplate,
        before: Sequence[Message],
        after: Sequence[Message],
        begun: str,
        tools: Sequence[Any],
        place: str,
    ) -> tuple[str, str]:
        """The rendered prompt before a response of this role, and the rendered response."""
        self._note(template, after, ())
        own = self._before(template, before, after[0]["role"], begun, tools, place)
        whole = self._render(template, [*before, *after], tools, place)
        if not whole.startswith(own):
            raise RecordError(
                f"{place}: {template.label} renders the prompt differently before this response "
                "than before others; remove the record, or give another template"
            )
        return own, self._without_trailing_space(whole[len(own) :])

    def _before(
        self,
        template: ChatTemplate,
        before: Sequence[Message],
        role: str,
        begun: str,
        tools: Sequence[Any],
        place: str,
    ) -> str:
        """The rendered turns before any turn of a role; `begun`, if nothing contradicts it."""
        probes = (Message(role=role, content=content) for content in PROBES)
        shown = (self._render(template, [*before, probe], tools, place) for probe in probes)
        first = next(shown)
        if first.startswith(begun):
            return begun
        second = next(shown)
        own = first[: shared_length(first, second)]
        if not all(
            text[len(own) :].lower().startswith(content.lower())
            for text, content in zip((first, second), PROBES, strict=True)
        ):
            raise RecordError(
                f"{place}: {template.label} renders no common text before all responses; "
                "give another template"
            )
        return own

    def _spans(
        self,
        template: ChatTemplate,
        before: Sequence[Message],
        after: Sequence[Message],
        begin: int,
        length: int,
        tools: Sequence[Any],
        place: str,
    ) -> Spans | None:
        """Which parts of a rendered response of this length the assistant wrote; None: all.

        Args:
          template: of the conversation.
          before: its turns before the response.
          after: the turns of the response.
          begin: where the response begins in the rendered conversation.
          length: of the rendered response, in characters.
          tools: of the conversation.
          place: file and line, for messages.
        """
        if len(after) == 1:
            return None
        turns = [*before, *after]
        if marks_assistant(template):
            text, marked = render_marked(template, self.tokenizer, turns, place, tools=tools)
            parts = [(start, self._with_end_of_turn(text, end)) for start, end in marked]
        else:
            parts = self._added_by_turns(template, turns, len(before), tools, place)
        spans = [(max(start - begin, 0), min(end - begin, length)) for start, end in parts]
        spans = tuple((start, end) for start, end in spans if start < end)
        if not spans:
            raise RecordError(f"{place}: {template.label} marks nothing of the response")
        return None if spans == ((0, length),) else spans

    def _added_by_turns(
        self,
        template: ChatTemplate,
        turns: Sequence[Message],
        first: int,
        tools: Sequence[Any],
        place: str,
    ) -> list[tuple[int, int]]:
        """The parts of a rendered conversation that its assistant's turns add, from the first on.

        Every conversation that ends with one of these turns must be a prefix of the whole.
        """
        whole, parts = self._render(template, turns, tools, place), []
        for at in range(first, len(turns)):
            if not _responds(turns[at]):
                continue
            earlier = turns[:at]
            begun = self._render(template, earlier, tools, place, add_generation_prompt=True)
            begun = self._before(template, earlier, turns[at]["role"], begun, tools, place)
            ended = self._render(template, turns[: at + 1], tools, place)
            if not whole.startswith(ended) or not ended.startswith(begun):
                raise RecordError(
                    f"{place}: {template.label} renders turn {at + 1} differently once others "
                    "follow, so that its tokens cannot be told; give a template with "
                    "{% generation %} blocks, or train on the last turn alone"
                )
            parts.append((len(begun), len(self._without_trailing_space(ended))))
        return parts

    def _with_end_of_turn(self, text: str, end: int) -> int:
        """The end of a part of the text, with the token after it that ends the turn."""
        tokens = (*END_OF_TURN, str(self.tokenizer.eos_token))
        return end + max(len(token) * text.startswith(token, end) for token in tokens)

    def prompt(self, prompt: Text, place: str) -> str:
        """The rendered prompt, which a response continues."""
        if (plain := self._plain(prompt)) is not None:
            return self.plain.prompt_format.replace("{prompt}", plain)
        turns, tools = _turns(prompt, "user"), tools_of(prompt)
        template = self._template(turns, tools, place)
        text = self._render(template, turns, tools, place, add_generation_prompt=True)
        self._count_turn(prompt)
        return text

    def whole(self, prompt: Text, response: Text, place: str) -> str:
        """A whole conversation as its template renders it."""
        turns, tools = [*_turns(prompt, "user"), *_turns(response, "assistant")], tools_of(prompt)
        return self._render(self._template(turns, tools, place), turns, tools, place)

    def _plain(self, prompt: Text) -> str | None:
        """The prompt, if it is not rendered by a template; else None."""
        plain = plain_text(prompt)
        if plain is None:
            return None
        if self.plain.line is not None:
            notice_once(self.plain.line)
        if self.plain.as_turns:
            return None
        self.plain_seen[False] += 1
        if isinstance(prompt, Conversation):
            self.unread.update({"system"} if prompt[0]["role"] == "system" else ())
            self.unread.update({"tools"} if prompt.tools else ())
        return plain

    def _count_turn(self, prompt: Text) -> None:
        """Count a plain prompt that the template rendered."""
        if self.plain.as_turns and plain_text(prompt) is not None:
            self.plain_seen[True] += 1

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


def _responds(turn: Message) -> bool:
    return turn["role"] not in NOT_RESPONDING


def _from_first_scored(text: RecordText) -> RecordText:
    """The texts with all that is before the first scored character in the prompt.

    What the assistant wrote before the first difference of a pair is not scored.
    """
    wholes, (first, *others) = [((0, len(one)),) for one in text.responses], text.responses
    sides = [own or whole for own, whole in zip(text.spans, wholes, strict=True)]
    same = min((shared_length(first, other) for other in others), default=len(first))
    if others:
        differing = [tuple(span for span in side if span[1] > same) for side in sides]
        sides = differing if all(differing) else sides
    cut = min(side[0][0] for side in sides)
    cut = cut if cut <= same else 0
    moved = [tuple((start - cut, end - cut) for start, end in side) for side in sides]
    responses = tuple(response[cut:] for response in text.responses)
    return replace(
        text,
        prompt=text.prompt + first[:cut],
        responses=responses,
        spans=tuple(
            None if spans == ((0, len(response)),) else spans
            for spans, response in zip(moved, responses, strict=True)
        ),
    )


def text_of(
    tokenizer: Tokenizer, prompt_format: str, chat_template: str | None, chat: Chat
) -> TextOf:
    """How records become text with a tokenizer and these options; see `plain_prompts`."""
    if "{prompt}" not in prompt_format:
        raise UserError(f"prompt_format: {prompt_format!r} must contain {{prompt}}")
    plain = plain_prompts(tokenizer, chat, prompt_format=prompt_format, chat_template=chat_template)
    return TextOf(
        tokenizer=tokenizer,
        chat_template=chat_template,
        plain=plain,
        special=frozenset(tokenizer.all_special_tokens) | {"<|im_end|>", "<end_of_turn>"},
    )
