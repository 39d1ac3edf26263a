"""The result of a search: a file from which the prompt of any query is composed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from jaxalign.data.reading import BadRecordError, check_text, read_json, text_fields
from jaxalign.errors import UserError
from jaxalign.files import write_text

Layout = Literal["continue", "transcript", "chat"]
LAYOUTS = get_args(Layout)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query and its response, as an in-context example."""

    query: str
    response: str


@dataclass(frozen=True, kw_only=True)
class PromptArtefact:
    """A system prompt and in-context examples."""

    system_prompt: str
    examples: tuple[Example, ...] = ()
    """All examples; the nearest to a query are shown."""
    shown: int = 3
    """Number of examples in a prompt; the paper's 3 at inference (2 during the search)."""
    layout: str = "continue"
    """"continue": one text with headings, for a base model; "transcript": one text of Human and
    Assistant turns; "chat": a system turn and a user turn."""
    embedder: str = "words"
    """Source of the vectors that find the nearest examples: "words", "model" (the model that
    answers), or the name of a backend."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Facts about its origin, for readers; no code reads them."""

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"layout: {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        if self.shown < 0:
            raise UserError(f"shown: {self.shown} is negative")


def write_artefact(artefact: PromptArtefact, path: Path) -> None:
    """Write an artefact as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(artefact), indent=1, ensure_ascii=False) + "\n")


def read_artefact(path: Path) -> PromptArtefact:
    """Read an artefact, written by `write_artefact` or by hand.

    Raises:
      UserError: there is no such file, or it does not have this form.
    """
    fields = read_json(path)
    try:
        examples = tuple(text_fields(Example, one) for one in fields.pop("examples", ()))
        for name in ("system_prompt", "layout", "embedder"):
            check_text(fields.get(name, ""), name)
        if not isinstance(fields.get("shown", 0), int):
            raise BadRecordError("wrong type", f"shown is {fields['shown']!r}, not a whole number")
        return PromptArtefact(examples=examples, **fields)
    except (BadRecordError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: not a prompt artefact ({error}); it has system_prompt, and may have examples "
            "({query, response}), shown, layout, embedder and provenance"
        ) from None
