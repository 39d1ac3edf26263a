"""Any model as a GGUF file, which llama.cpp and what is built on it run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.data import load_tokenizer
from jaxalign.data.gguf_writing import check_tokens, tokenizer_metadata
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError
from jaxalign.files import read_json
from jaxalign.gguf import is_gguf, read_gguf
from jaxalign.models import load_pretrained
from jaxalign.models.folders import find_model, read_config
from jaxalign.models.gguf import generation_metadata
from jaxalign.models.gguf_saving import gguf_architecture, save_gguf
from jaxalign.runs.exports import GENERATION
from jaxalign.runs.restore import run_model
from jaxalign.stages.models import read_model_config, read_run_config

OF_THE_FILE = ("architecture", "type", "file_type", "quantization_version", "alignment")
"""Keys of "general" that describe a file and not its model."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What goes into a GGUF file."""

    name: str
    model: Any
    tokenizer: Tokenizer
    original: Mapping[str, Any] | None
    """Metadata of the GGUF file that the tokenizer came from, if it came from one."""
    general: Mapping[str, Any]
    """Metadata of the model, of a GGUF file; empty: it was none."""
    generation: Mapping[str, Any]


def export_gguf(
    source: str,
    target: Path,
    *,
    format: str = "f32",
    stage: str | None = None,
    step: int | None = None,
) -> None:
    """Write a model with its tokenizer as a GGUF file.

    The tokenizer's metadata are those of the GGUF file that it came from, where it came from one.

    Args:
      source: run folder, Hugging Face folder, Hub name or GGUF file.
      target: file to write.
      format: of the matrices: f32, f16, bf16 or q8_0.
      stage: of a run folder; None: the last.
      step: of the stage; None: the newest intact checkpoint.

    Raises:
      UserError: there is no such model, or GGUF cannot express it.
    """
    folder = Path(source)
    if (folder / "params").is_dir():
        raise UserError(
            f"{source}: an Orbax folder has no tokenizer, which a GGUF file needs; convert it to a "
            "Hugging Face folder, add the tokenizer's files there, and convert that"
        )
    is_run = (folder / "checkpoints").is_dir()
    found = _of_run(folder, stage, step) if is_run else _of_model(source)
    rows = found.model.config.vocab_size
    tokenizer = tokenizer_metadata(found.tokenizer, rows, original=found.original)
    metadata = {"general.name": _named(found), **found.general, **tokenizer}
    metadata |= generation_metadata(found.generation, tokenizer)
    architecture = {"general.architecture": gguf_architecture(found.model.config)}
    check_tokens(found.tokenizer, metadata | architecture)
    save_gguf(found.model, target, format=format, metadata=metadata)


def _of_run(folder: Path, stage: str | None, step: int | None) -> _Source:
    config = read_run_config(folder)
    gguf_architecture(read_model_config(folder))
    file, generation = Path(config.model).expanduser(), folder / GENERATION
    from_file = is_gguf(file) and file.is_file() and config.tokenizer is None
    return _Source(
        name=config.name,
        model=run_model(folder, stage, step)[0],
        tokenizer=load_tokenizer(folder / "tokenizer"),
        original=read_gguf(file).metadata if from_file else None,
        general={},
        generation=read_json(generation, "the generation config") if generation.is_file() else {},
    )


def _of_model(source: str) -> _Source:
    found = find_model(source)
    gguf_architecture(read_config(found))
    known: Mapping[str, Any] | None = None
    general: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    if is_gguf(found):
        known = read_gguf(found).metadata
        dropped = {f"general.{name}" for name in OF_THE_FILE}
        general = {key: value for key, value in known.items() if key.startswith("general.")}
        general = {key: value for key, value in general.items() if key not in dropped}
    elif (found / GENERATION).is_file():
        generation = read_json(found / GENERATION, "the generation config")
    path = Path(source).expanduser().resolve()
    return _Source(
        name=path.stem if is_gguf(path) else path.name,
        model=load_pretrained(found),
        tokenizer=load_tokenizer(found),
        original=known,
        general=general,
        generation=generation,
    )


def _named(source: _Source) -> str:
    """The model's name; llama.cpp knows by Phi-3's that special tokens absorb spaces after them."""
    added: Mapping[int, Any] = source.tokenizer.added_tokens_decoder
    strips = source.model.config.family == "phi3" and any(one.rstrip for one in added.values())
    return f"phi-3 {source.name}" if strips else source.name
