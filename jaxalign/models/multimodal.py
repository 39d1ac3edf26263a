"""The language model of a checkpoint that also reads images: its config and its tensors."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.tensor_files import TensorFiles

TEXT_FAMILIES = {"gemma3": "gemma3_text"}
"""Families of images and text -> the family of the language model inside."""
BODY = re.compile(r"(?:model\.language_model|language_model\.model)\.")
HEAD = re.compile(r"(?:language_model\.)?(lm_head|score)\.")
OUTER_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
LOGGER = logging.getLogger(__name__)


def text_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone; that of a language model unchanged.

    Raises:
      UserError: if the config of a model of images and text has no `text_config`.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in TEXT_FAMILIES:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError("text_config: missing; it describes the language model")
    outer = {name: hf[name] for name in OUTER_FIELDS if hf.get(name) is not None}
    return {**text, **outer, "model_type": TEXT_FAMILIES[family]}


class TextTensors:
    """The tensors of the language model alone, under the names of its own family.

    Args:
      files: of the whole model.
      folder: named in the message that says what is left out.
    """

    def __init__(self, files: TensorFiles, folder: Path):
        self._files = files
        named = {name: text_name(name) for name in files.shapes}
        self._stored = {ours: name for name, ours in named.items() if ours is not None}
        self.shapes = {ours: files.shapes[name] for ours, name in self._stored.items()}
        left = sorted({_tower(name) for name, ours in named.items() if ours is None})
        if left:
            LOGGER.warning(
                f"{folder}: {', '.join(left)} left out; the language model alone is loaded"
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `TensorFiles.read`."""
        return self._files.read(self._stored[name], index)


def holds_language_model(files: TensorFiles) -> bool:
    """Whether the tensors are those of a model with a language model inside."""
    return any(BODY.match(name) for name in files.shapes)


def text_name(name: str) -> str | None:
    """The name within the language model; None for a tensor of something else."""
    if BODY.match(name):
        return BODY.sub("model.", name, count=1)
    return HEAD.sub(r"\1.", name, count=1) if HEAD.match(name) else None


def _tower(name: str) -> str:
    """The part of the model that a tensor belongs to: "vision_tower"."""
    return name.removeprefix("model.").split(".")[0]
