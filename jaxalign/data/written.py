"""Records that are written again, and the files that hold those that are read."""

from pathlib import Path
from typing import Any

from jaxalign.data.mixtures import weighted_sources
from jaxalign.data.reading import source_files
from jaxalign.data.records import Conversation, Text


def prompt_fields(prompt: Text) -> dict[str, Any]:
    """The fields of a row whose prompt, read again, is the same: its system turn and tools, too."""
    if not isinstance(prompt, Conversation):
        return {"prompt": prompt}
    fields: dict[str, Any] = {"prompt": list(prompt) if prompt.text is None else prompt.text}
    if prompt.text is not None and prompt[0]["role"] == "system":
        fields["system"] = prompt[0]["content"]
    return fields | ({"tools": list(prompt.tools)} if prompt.tools else {})


def input_files(*sources: str | None) -> list[Path]:
    """The files of sources that are files or folders, also with a weight or a split.

    Args:
      *sources: "SOURCE[:WEIGHT][#SPLIT]", as for `weighted_sources`; None: no source.
    """
    typed = [source for source in sources if source]
    found = weighted_sources(typed) if typed else []
    return [file for one in found for file in source_files(one.source)[0]]
