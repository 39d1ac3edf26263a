"""Digests of a run's inputs: a run is not resumed if a file has changed since its start."""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.config import TrainConfig
from jaxalign.config.preference import LOSSES
from jaxalign.data.mixtures import weighted_sources
from jaxalign.data.reading import FILES, split_name
from jaxalign.errors import UserError, notice
from jaxalign.files import digest, digests, read_json, write_json
from jaxalign.losses import members_in
from jaxalign.models.folders import find_model
from jaxalign.online.rewards import split_weight
from jaxalign.stages.inputs import INPUTS

MODEL_FILES = (".safetensors", ".gguf", ".json", ".model", ".txt", ".jinja")
Digests = Mapping[str, Mapping[str, str]]
"""Field of the config -> file -> SHA-256."""


def input_digests(config: TrainConfig) -> Digests:
    """Digests of every file that a run reads: data, weights, tokenizers and user code.

    Data from the Hub or TFDS is not included; see `example_digests`.
    """
    digests_of = {}
    for field, paths in _inputs(config):
        if files := {str(path): one for path in paths for path, one in _digests(path)}:
            digests_of[field] = files
    return digests_of


def _inputs(config: TrainConfig) -> Iterator[tuple[str, list[Path]]]:
    """Fields of a config with their local files and folders."""
    reads_pairs = config.sft.runs or config.preference.runs or config.representation.runs
    if reads_pairs:
        yield "data", _all_data("data", config.data)
        yield "eval_data", _all_data("eval_data", config.eval_data)
    if config.sft.runs:
        yield "sft_data", _all_data("sft_data", config.sft.data)
    if config.pretrain.runs:
        yield "text", [path for source in config.pretrain.text for path in _data(source)]
        yield "eval_text", [path for source in config.pretrain.eval_text for path in _data(source)]
    if config.model != "embedded":
        yield "model", [find_model(config.model)]
    yield "tokenizer", _named(config.tokenizer)
    yield "adapter", _named(config.adapter)
    if config.preference.runs:
        loss = config.preference.loss
        names = [name for name, _ in members_in(loss, LOSSES)] or [loss]
        yield "loss", [file for name in names for file in _code(name)]
    if config.feedback.runs:
        own = config.feedback
        yield "feedback.data", _all_data("feedback.data", own.data or config.data)
        yield "feedback.eval_data", _all_data("feedback.eval_data", own.eval_data)
        yield "feedback.loss", _code(config.feedback.loss)
    if config.online.runs:
        rollout = config.online.rollout
        yield "rollout.prompts", _data(rollout.prompts)
        yield "rollout.eval_prompts", _data(rollout.eval_prompts)
        yield "rollout.algorithm", _code(rollout.algorithm)
        kind, _, rest = (rollout.annotator or "").partition(":")
        yield "rollout.annotator", _code(rest) if kind == "rule" else _named(rest or None)
        files = [file for name in rollout.reward for file in _code(split_weight(name)[0])]
        yield "rollout.reward", files
        yield "rollout.judge.template", _named(rollout.judge.template)
        yield "rollout.judge.tokenizer", _named(rollout.judge.tokenizer)
    if config.representation.runs:
        yield "alignment.positive_model", _named(config.representation.alignment.positive_model)
        yield "alignment.negative_model", _named(config.representation.alignment.negative_model)


def _named(name: str | None) -> list[Path]:
    path = None if name is None else Path(name).expanduser()
    return [] if path is None or not path.exists() else [path]


def _data(source: str | None) -> list[Path]:
    return [] if source is None else _named(split_name(source)[0])


def _all_data(field: str, texts: Sequence[str] | str | None) -> list[Path]:
    sources = weighted_sources(texts, field) if texts else []
    return [path for one in sources for path in _data(one.source)]


def _code(name: str) -> list[Path]:
    """The file of "FILE.py:FUNCTION" or "package.module:FUNCTION"."""
    module = name.rpartition(":")[0]
    if not module or Path(module).is_file():
        return _named(module or None)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    return [] if spec is None or spec.origin is None else _named(spec.origin)


def _digests(path: Path) -> Iterator[tuple[Path, str]]:
    """Digests of a file, or of the files in a folder with data, a model or a run's export."""
    if path.is_file():
        yield path, digest(path)
        return
    folders = [path, path / "export"]
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    kinds = {*FILES, *MODEL_FILES}
    files = [file for file in files if file.is_file() and kinds & set(file.suffixes)]
    for name, one in digests(path, files).items():
        yield path / name, one


def example_digests(data: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> SHA-256 of its tokenised examples, from any source."""
    digests_of = {}
    for stage, value in data.items():
        hashed = hashlib.sha256()
        for part in _parts(value):
            hashed.update(len(part).to_bytes(8, "little"))
            hashed.update(part)
        digests_of[stage] = hashed.hexdigest()
    return digests_of


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """The numbers and texts in a value, as bytes."""
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).data.cast("B") if value.size else b""
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in UNREAD:
                yield field.name.encode()
                yield from _parts(getattr(value, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _parts(one)
    else:
        yield repr(value).encode()


UNREAD = ("sources", "shard", "joint_share", "packing", "mismatched")
UNREAD += ("mixture", "held_out_by_source", "largest", "common")
"""Fields of a stage's data that are not hashed: its sources, how batches are made of it, and what
follows from its tokens."""


def check_inputs(folder: Path, now: Digests, fields: Sequence[str] | None = None) -> list[str]:
    """Inputs that have changed since the run in a folder was started, one message for each.

    Args:
      folder: of the run.
      now: from `input_digests`.
      fields: to compare; None: all.

    Returns:
      Messages; empty if nothing has changed, or if the folder has no digests.
    """
    path = folder / INPUTS
    if not path.exists():
        notice(
            f"{folder}: a run of a version before 0.2, without digests of its inputs; they are "
            "used without a check, and the remaining steps read the records in the new order of "
            "0.2 (set --name to start another run instead)"
        )
        return []
    before = read_json(path, "list of digests").get("files")
    if not isinstance(before, dict) or not all(isinstance(x, dict) for x in before.values()):
        raise UserError(f"{path}: not a list of digests; restore or remove it")
    changed = []
    for field in before if fields is None else [one for one in fields if one in before]:
        if field not in now:
            changed.append(f"{field}: {', '.join(before[field])} cannot be found")
            continue
        for file in sorted({*now[field], *before[field]}):
            if now[field].get(file) != before[field].get(file):
                changed.append(f"{field}: {file} is not what the run began with")
    return changed


def keep_inputs(folder: Path, now: Digests) -> None:
    """Store the digests of the inputs in the run folder, unless it has them already."""
    if not (folder / INPUTS).exists():
        write_json(folder / INPUTS, {"files": now})


def check_examples(folder: Path, data: Mapping[str, Any]) -> None:
    """Check that the stages read the same examples as at the start of the run; then, store them.

    This finds what `check_inputs` cannot: changed data on the Hub or in TFDS, and another version
    of a library that reads or tokenises data.

    Raises:
      UserError: the examples have changed.
    """
    path, now = folder / INPUTS, example_digests(data)
    kept = read_json(path, "list of digests")
    before = kept.setdefault("examples", now)
    if not isinstance(before, dict):
        raise UserError(f"{path}: not a list of digests; restore or remove it")
    if changed := [stage for stage in now if before.get(stage, now[stage]) != now[stage]]:
        raise UserError(
            f"{folder}: the examples of {', '.join(changed)} are not what the run began with "
            "(other data of that name, or another version of jaxalign, transformers or "
            "tokenizers); set --name to start another run"
        )
    if kept != read_json(path, "list of digests"):
        write_json(path, kept)
