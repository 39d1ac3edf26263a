"""Prompts that are plain text: through a chat template or as they are, by one rule."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxalign.data.bpe import CHAT_TEMPLATE
from jaxalign.errors import UserError

Chat = Literal["auto", "always", "never"]
"""Whether plain prompts go through the chat template: by the rule of `plain_prompts`, or not."""
KEPT = "jaxalign_chat"
"""Field of tokenizer_config.json: "always" or "never", as the model beside it was trained."""
TURN = "plain prompts go through the chat template, as a user's turn"
TEXT = "plain prompts stay plain text"


@dataclass(frozen=True, kw_only=True)
class PlainPrompts:
    """What becomes of prompts that are text."""

    as_turns: bool
    """Through the chat template: the prompt as a user's turn, the response as the assistant's."""
    line: str | None = None
    """What a user is to know of it, and how to have it otherwise; None: nothing was decided."""


def plain_prompts(
    tokenizer: Any,
    chat: Chat = "auto",
    *,
    prompt_format: str = "{prompt}",
    chat_template: str | None = None,
) -> PlainPrompts:
    """Whether plain prompts go through the chat template.

    "auto" goes by what is known, the first of these: a prompt format of the user's own means plain
    text; a model that was trained here is asked as it was trained, which its tokenizer's folder
    keeps; the template of tokenizers made here (`jaxalign.data.bpe`) is for conversations alone;
    any other template is the model's own, and takes all prompts. Without one, text stays text.

    Args:
      tokenizer: from `load_tokenizer`.
      chat: what the user wants.
      prompt_format: text around a plain prompt.
      chat_template: in place of the tokenizer's own.

    Raises:
      UserError: "always", and there is no template.
    """
    own, name = tokenizer.chat_template, getattr(tokenizer, "name_or_path", "")
    template, told = chat_template or own, f"{name}: " if name else ""
    formatted, kept = prompt_format != "{prompt}", tokenizer.init_kwargs.get(KEPT)
    if chat == "always":
        if not template:
            raise UserError(
                f"{told}chat: always, but the tokenizer has no chat template; set auto or never"
            )
        over = f"{told}{TURN}; prompt_format is not read (--chat never reads it)"
        return PlainPrompts(as_turns=True, line=over if formatted else None)
    if chat == "never" or not template:
        return PlainPrompts(as_turns=False)
    if formatted:
        line = f"{told}{TEXT}, in the given prompt_format; --chat always takes the chat template"
        return PlainPrompts(as_turns=False, line=line)
    if kept == "always":
        line = f"{told}{TURN}, as it was trained; --chat never keeps them plain text"
        return PlainPrompts(as_turns=True, line=line)
    if template == CHAT_TEMPLATE:
        return PlainPrompts(as_turns=False)
    if kept == "never":
        line = f"{told}{TEXT}, as it was trained; --chat always takes the chat template"
        return PlainPrompts(as_turns=False, line=line)
    if chat_template is None and isinstance(own, Mapping) and "default" not in own:
        names = ", ".join(sorted(own))
        line = f"{told}{TEXT}: of the chat templates {names} none is the default; "
        return PlainPrompts(as_turns=False, line=f"{line}--tokenizer FOLDER#NAME chooses one")
    return PlainPrompts(as_turns=True, line=f"{told}{TURN}; --chat never keeps them plain text")


def reads_template(tokenizer: Any, chat: Chat) -> bool:
    """Whether a judge or a reward model reads its chat template; "auto": where it has one.

    Its questions are the template's own kind of text, however the model was trained since.

    Raises:
      UserError: as in `plain_prompts`.
    """
    found = bool(tokenizer.chat_template)
    return found if chat == "auto" else plain_prompts(tokenizer, chat).as_turns


def with_choice(tokenizer: Any, *, as_turns: bool) -> Any:
    """A tokenizer whose folder will say how plain prompts were read in training."""
    if not tokenizer.chat_template:
        return tokenizer
    kept = copy.copy(tokenizer)
    kept.init_kwargs = {**tokenizer.init_kwargs, KEPT: "always" if as_turns else "never"}
    return kept
