"""Where models come from: Hugging Face folders, the Hub and GGUF files, and their configs."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from jaxalign.errors import UserError
from jaxalign.gguf import is_gguf
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import FAMILIES, REFUSED
from jaxalign.models.families.mapping import check_numbers
from jaxalign.models.gguf import config_fields
from jaxalign.models.multimodal import TEXT_FAMILIES, text_fields

HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONFIG_FILES = ("config.json",)
QUANTISED = {"gptq": "GPTQ", "awq": "AWQ"}
"""Names of methods as their authors write them, where config.json has another."""


def find_folder(path_or_hub_name: str | Path, files: Iterable[str] = HUB_FILES) -> Path:
    """The local folder of that name, or the Hub's snapshot of it.

    Args:
      path_or_hub_name: "folder" or "org/name".
      files: patterns of the files to download; by default safetensors, JSON and tokenizers.

    Raises:
      UserError: if neither exists.
    """
    path = Path(path_or_hub_name).expanduser()
    name = str(path_or_hub_name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{name}: no such folder here, and could not load it from the Hub ({reason}); "
            "give a local folder or check the name and the connection"
        ) from error


def exported(name: str | Path) -> str | Path:
    """The exported model of a run's folder; any other name unchanged.

    Raises:
      UserError: it is a run's folder without an export.
    """
    folder = Path(name).expanduser()
    if (folder / "export").is_dir():
        return folder / "export"
    if (folder / "metrics.jsonl").is_file() and not any(folder.glob("*.safetensors")):
        if not (folder / "checkpoints").is_dir():
            raise UserError(f"{name}: a run without an export, and without checkpoints")
        raise UserError(
            f"{name}: a run without an export; make one with jaxalign convert {name} FOLDER, and "
            "name that folder"
        )
    return name


def find_model(path_or_hub_name: str | Path, files: Iterable[str] = HUB_FILES) -> Path:
    """The GGUF file of that name, or the folder as `find_folder` finds it."""
    path = Path(path_or_hub_name).expanduser()
    return path if is_gguf(path) and not path.is_dir() else find_folder(path_or_hub_name, files)


def read_config(source: Path, name: str = "config.json") -> ModelConfig:
    """A model's architecture, from its folder's config file or its GGUF file's metadata.

    Raises:
      UserError: if the file is missing or broken, or the family is not supported.
    """
    if is_gguf(source):
        return _config(source, json.dumps(config_fields(source)))
    file = source / name
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    except FileNotFoundError:
        found = next(iter(sorted(source.glob("*.gguf"))), None)
        hint = "" if found is None else f"; for the GGUF file there, name {found}"
        raise UserError(
            f"{file}: missing; a model folder has config.json and safetensors{hint}"
        ) from None
    return _config(file, text)


def _config(file: Path, text: str) -> ModelConfig:
    """The architecture in a config's text; the file is named in messages."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: a JSON object is expected")
    outer, packed = fields.get("model_type"), fields.pop("quantization_config", None)
    if packed and not _unpacks(outer, packed):
        raise UserError(f"{file}: quantization_config: {_quantised(packed)}")
    try:
        fields = text_fields(fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{file}: model_type: {_unsupported(family)}")
    try:
        check_numbers(fields)
        config = FAMILIES[family].config(fields)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config.json: ')}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}") from None
    unchanged = family == outer and not packed
    return dataclasses.replace(config, source=text if unchanged else json.dumps(fields))


def _unpacks(family: object, quantization: object) -> bool:
    """Whether the family's weights are also read in this packed form."""
    readable = getattr(FAMILIES.get(str(family)), "PACKED", ())
    return isinstance(quantization, dict) and quantization.get("quant_method") in readable


def _quantised(settings: object) -> str:
    """Why quantised weights are not supported, and what to load in their place."""
    fields = settings if isinstance(settings, dict) else {}
    method = fields.get("quant_method")
    if method is None and any(fields.get(f"load_in_{bits}bit") for bits in (4, 8)):
        method = "bitsandbytes"  # of older files, which do not name it
    name = QUANTISED.get(str(method), str(method or "an unnamed method"))
    advice = "name the model that was quantised, or a GGUF file of it"
    if method == "bitsandbytes":
        advice += (
            ", or write its weights in full with transformers: "
            "from_pretrained(FOLDER).dequantize().save_pretrained(NEW)"
        )
    return f"weights quantised by {name} are not supported; {advice}"


def _unsupported(family: object) -> str:
    """Why a family is not supported."""
    if isinstance(family, str) and family in REFUSED:
        return f"{family!r} is not supported: {REFUSED[family]}"
    return f"{family!r} is not supported; it has {', '.join(sorted({*FAMILIES, *TEXT_FAMILIES}))}"
