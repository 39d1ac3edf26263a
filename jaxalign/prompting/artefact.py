"""What a search leaves behind: a file from which any prompt can be composed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxalign.data.reading import BadRecordError, check_text, read_json, text_fields
from jaxalign.errors import UserError
from jaxalign.files import write_text

LAYOUTS = ("continue", "transcript", "chat")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query with the answer that shows how to answer."""

    query: str
    response: str


@dataclass(frozen=True, kw_only=True)
class PromptArtefact:
    """A system prompt and in-context examples."""

    system_prompt: str
    examples: tuple[Example, ...] = ()
    """The universal set; of these the nearest to a query are shown."""
    shown: int = 3
    """How many; the paper's 3 at inference (2 while searching)."""
    layout: str = "continue"
    """"continue": one text for a base model, its parts marked by headings; "transcript": one text
    of Human's and Assistant's turns; "chat": a system's and a user's turn."""
    embedder: str = "words"
    """Name of what finds the nearest examples: "words", "model" (the one that answers), or a
    backend."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from; read by people alone."""

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"layout: {self.layout!r} is none of {', '.join(LAYOUTS)}")
        if self.shown < 0:
            raise UserError(f"shown: {self.shown} is negative")


def write_artefact(artefact: PromptArtefact, path: Path) -> None:
    """Write it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(artefact), indent=1, ensure_ascii=False) + "\n")


def read_artefact(path: Path) -> PromptArtefact:
    """Read what `write_artefact` wrote, or a person.

    Raises:
      UserError: there is no such file, or it is not of this form.
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
            f"{path}: no prompt artefact ({error}); it has system_prompt, and may have examples "
            "({query, response}), shown, layout, embedder and provenance"
        ) from None
