"""The text of records: chat templates for conversations, a format for plain prompts."""

from dataclasses import dataclass
from typing import Any

from jaxalign.data.records import Text, shared_length
from jaxalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextOf:
    """How records become text: templates for conversations, a format for plain prompts."""

    tokenizer: Any
    prompt_format: str
    chat_template: str | None
    strings_as_chat: bool
    special: frozenset[str]

    def __call__(self, prompt: Text, response: Text, place: str) -> tuple[str, str, bool]:
        """(prompt text, response text, whether the template differs)."""
        if isinstance(prompt, str) and isinstance(response, str) and not self.strings_as_chat:
            return self.prompt_format.replace("{prompt}", prompt), response, False
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        after = (
            [{"role": "assistant", "content": response}]
            if isinstance(response, str)
            else list(response)
        )
        begun = self._apply(before, place, add_generation_prompt=True)
        whole = self._apply(before + after, place, add_generation_prompt=False)
        differs = not whole.startswith(begun)
        cut = shared_length(begun, whole) if differs else len(begun)
        return whole[:cut], self._without_trailing_space(whole[cut:]), differs

    def prompt(self, prompt: Text, place: str) -> str:
        """The text that a response would continue."""
        if isinstance(prompt, str) and not self.strings_as_chat:
            return self.prompt_format.replace("{prompt}", prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self._apply(turns, place, add_generation_prompt=True)

    def _apply(self, messages: list[Any], place: str, **options: Any) -> str:
        import jinja2

        template = self.chat_template or self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{place}: a conversation, but the tokenizer has no chat template; "
                "name one, or give prompt, chosen and rejected as text"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=template, **options
            )
        except jinja2.exceptions.TemplateError as error:
            raise UserError(f"{place}: the chat template refuses it: {error}") from None

    def _without_trailing_space(self, text: str) -> str:
        """A turn's end mark is the end; templates often put a newline after it."""
        stripped = text.rstrip()
        return stripped if any(stripped.endswith(token) for token in self.special) else text


def text_of(
    tokenizer: Any, prompt_format: str, chat_template: str | None, strings_as_chat: bool
) -> TextOf:
    """How records become text with this tokenizer and these options."""
    if "{prompt}" not in prompt_format:
        raise UserError(f"prompt_format: {prompt_format!r} does not hold {{prompt}}")
    return TextOf(
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        chat_template=chat_template,
        strings_as_chat=strings_as_chat,
        special=frozenset(tokenizer.all_special_tokens) | {"<|im_end|>", "<end_of_turn>"},
    )
