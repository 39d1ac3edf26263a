"""The rule for plain prompts: through the chat template, or as plain text."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxalign.data.bpe import CHAT_TEMPLATE
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError

Chat = Literal["auto", "always", "never"]
"""Whether plain prompts go through the chat template: by the rule of `plain_prompts`, or not."""
KEPT = "jaxalign_chat"
"""Field of tokenizer_config.json: "always" or "never", as the model was trained."""
FORMAT = "jaxalign_prompt_format"
"""Field of tokenizer_config.json: text around a plain prompt, as the model was trained."""
TURN = "plain prompts go through the chat template, as a user's turn"
TEXT = "plain prompts stay plain text"

NO_END = "jaxalign_no_end_token"
"""Field of tokenizer_config.json: true, if responses had no end-of-sequence token in training."""


@dataclass(frozen=True, kw_only=True)
class PlainPrompts:
    """How plain prompts are rendered."""

    as_turns: bool
    """Whether the chat template renders them: prompt as user turn, response as assistant turn."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt that is no turn."""
    line: str | None = None
    """Notice of the decision and of the flag that changes it; None: nothing was decided."""


def plain_prompts(
    tokenizer: Tokenizer,
    chat: Chat = "auto",
    *,
    prompt_format: str = "{prompt}",
    chat_template: str | None = None,
) -> PlainPrompts:
    """Whether plain prompts go through the chat template.

    "auto" uses the first rule that applies: with a custom prompt format, plain text; a model
    trained here, as it was trained, which the folder of its tokenizer records, with its format of
    plain text; with the template of tokenizers made here (`jaxalign.data.bpe`), plain text; with
    any other template, the template. Without a template, plain text.

    Args:
      tokenizer: from `load_tokenizer`.
      chat: the choice of the user.
      prompt_format: text around a plain prompt.
      chat_template: in place of the tokenizer's own.

    Raises:
      UserError: "always", and there is no template.
    """
    own, name = tokenizer.chat_template, getattr(tokenizer, "name_or_path", "")
    template, prefix = chat_template or own, f"{name}: " if name else ""
    formatted, kept = prompt_format != "{prompt}", tokenizer.init_kwargs.get(KEPT)
    if chat == "always":
        if not template:
            raise UserError(
                f"{prefix}chat: always, but the tokenizer has no chat template; set auto or never"
            )
        notice = f"{prefix}{TURN}; prompt_format is not read (--chat never reads it)"
        return PlainPrompts(as_turns=True, line=notice if formatted else None)
    if chat == "never":
        return PlainPrompts(as_turns=False, prompt_format=prompt_format)
    if formatted:
        line = f"{prefix}{TEXT}, in the given prompt_format; --chat always takes the chat template"
        line = line if template else None
        return PlainPrompts(as_turns=False, prompt_format=prompt_format, line=line)
    if trained_in := tokenizer.init_kwargs.get(FORMAT):
        line = f"{prefix}{TEXT} in {trained_in!r}, as it was trained; --chat never leaves that out"
        return PlainPrompts(as_turns=False, prompt_format=trained_in, line=line)
    if not template:
        return PlainPrompts(as_turns=False)
    if kept == "always":
        line = f"{prefix}{TURN}, as it was trained; --chat never keeps them plain text"
        return PlainPrompts(as_turns=True, line=line)
    if template == CHAT_TEMPLATE:
        return PlainPrompts(as_turns=False)
    if kept == "never":
        line = f"{prefix}{TEXT}, as it was trained; --chat always takes the chat template"
        return PlainPrompts(as_turns=False, line=line)
    if chat_template is None and isinstance(own, Mapping) and "default" not in own:
        names = ", ".join(sorted(own))
        line = f"{prefix}{TEXT}: none of the chat templates {names} is the default; "
        return PlainPrompts(as_turns=False, line=f"{line}--tokenizer FOLDER#NAME chooses one")
    return PlainPrompts(as_turns=True, line=f"{prefix}{TURN}; --chat never keeps them plain text")


def reads_template(tokenizer: Tokenizer, chat: Chat) -> bool:
    """Whether a judge or a reward model uses its chat template; "auto": if it has one.

    Raises:
      UserError: as in `plain_prompts`.
    """
    found = bool(tokenizer.chat_template)
    return found if chat == "auto" else plain_prompts(tokenizer, chat).as_turns


def ends_responses(tokenizer: Tokenizer) -> bool:
    """Whether an end-of-sequence token follows responses, as the model was trained."""
    return not tokenizer.init_kwargs.get(NO_END)


def with_choice(tokenizer: Tokenizer, plain: PlainPrompts, *, end_token: bool = True) -> Any:
    """A tokenizer whose folder records what texts looked like in training.

    Args:
      tokenizer: of the run.
      plain: how plain prompts were rendered.
      end_token: whether an end-of-sequence token followed responses.
    """
    fields = {}
    if tokenizer.chat_template:
        fields[KEPT] = "always" if plain.as_turns else "never"
    if not plain.as_turns and plain.prompt_format != "{prompt}":
        fields[FORMAT] = plain.prompt_format
    if not end_token:
        fields[NO_END] = True
    known = (KEPT, FORMAT, NO_END)
    others = {name: x for name, x in tokenizer.init_kwargs.items() if name not in known}
    kept = copy.copy(tokenizer)
    kept.init_kwargs = others | fields
    return kept
