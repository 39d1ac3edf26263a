"""Models written as Hugging Face folders."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxalign.files import replacing, write_json, writing
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import FAMILIES
from jaxalign.models.families.mapping import Weight
from jaxalign.models.weights import layer_names, stack_places, weight_table

Place = tuple[int, ...]
"""Number of the layer, and of the expert, where a weight has these."""


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_size: int = 5 * 1000**3,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config.json and safetensors that transformers opens.

    Tensors are taken from the devices layer by layer, and at most one shard is held at a time.

    Args:
      model: a `Decoder`, `EncoderDecoder` or `ScoreModel`, or anything with its `config` and
        `params`.
      folder: created if absent; weights of an earlier save are removed.
      tokenizer: written beside the model with its own `save_pretrained`, if given.
      dtype: dtype of the file; None is the parameters' own.
      max_shard_size: maximum bytes of a file; a larger model is written as several, with an index.
      fields: additional fields of config.json.

    Returns:
      The folder.
    """
    folder = Path(folder)
    params = dict(leaf_items(model.params))
    shapes = {path: leaf.shape for path, leaf in params.items()}
    scored = "score/kernel" in shapes
    plan = save_plan(weight_table(model.config, scored=scored), shapes)
    writer = jax.process_index() == 0
    target = np.dtype(dtype) if dtype is not None else np.dtype(next(iter(params.values())).dtype)

    def tensor(weight: Weight, place: Place) -> np.ndarray:
        parts = [to_host(params[path], place) for path in weight.paths]
        joined = weight.join(*parts)
        kept = joined.dtype if dtype is None else target
        return np.ascontiguousarray(joined.astype(kept, copy=False))

    def nbytes(weight: Weight) -> int:
        items = [params[path] for path in weight.paths]
        sizes = [x.size // math.prod(x.shape[: weight.stacked]) for x in items]
        return sum(sizes) * (items[0].dtype.itemsize if dtype is None else target.itemsize)

    shards: list[list[tuple[str, Weight, Place]]] = [[]]
    filled = total = 0
    for entry in plan:
        size = nbytes(entry[1])
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled, total = filled + size, total + size
    if writer:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    files = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, entries in zip(files, shards, strict=True):
        tensors = {name: tensor(weight, place) for name, weight, place in entries}
        if writer:
            from safetensors.numpy import save_file

            with replacing(folder / file) as scratch:
                save_file(tensors, scratch, metadata={"format": "pt"})
    if writer:
        _remove_old_weights(folder, keep=files)
        if len(shards) > 1:
            where = {
                name: file
                for file, entries in zip(files, shards, strict=True)
                for name, _, _ in entries
            }
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(folder / "model.safetensors.index.json", index)
        written = hf_config(model.config, dtype=target, scored=scored) | dict(fields or {})
        write_json(folder / "config.json", written)
        if tokenizer is not None:
            with writing(folder):
                tokenizer.save_pretrained(folder)
    return folder


def hf_config(config: ModelConfig, *, dtype: Any, scored: bool = False) -> dict[str, Any]:
    """The `config.json` of a config: its source, where that still describes the same model.

    Otherwise the family rewrites its fields, and those that do not shape the model (token ids) are
    kept. With a scalar head it is a sequence classifier with one label.
    """
    family, fields = FAMILIES[config.family], config.source_fields
    if not (fields and family.config(fields) == config):
        kept = {
            key: value
            for key, value in fields.items()
            if key not in ("rope_parameters", "layer_types")
        }
        fields = kept | family.hf_config(config)
    name = score_architecture(family) if scored else family.ARCHITECTURE
    fields |= {"model_type": config.family, "architectures": [name]}
    if scored:
        fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    fields.pop("torch_dtype", None)
    fields.pop("dtype", None)
    return fields | {"torch_dtype": np.dtype(dtype).name}


def score_architecture(family: ModuleType) -> str:
    """Transformers' class with a scalar head; the model below it where there is none."""
    usual = family.ARCHITECTURE.replace("ForCausalLM", "ForSequenceClassification")
    return getattr(family, "SCORE_ARCHITECTURE", usual)


def leaf_items(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Path ("layers/q/kernel") and array of every leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaf_items(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def save_plan(
    table: Iterable[Weight], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, Weight, Place]]:
    """Every tensor to write, in the order of layers."""
    plan: list[tuple[str, Weight, Place]] = [
        (name, w, tuple(at.values()))
        for w in table
        for name, at in zip(
            layer_names(w, shapes), stack_places(w, shapes[w.paths[0]]), strict=True
        )
    ]
    return sorted(plan, key=lambda entry: entry[2][:1] or (-1,))


def to_host(leaf: Any, place: Place = ()) -> np.ndarray:
    """A leaf, or one layer or expert of it, gathered from all devices and processes."""
    part = leaf[place] if place else leaf
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _remove_old_weights(folder: Path, *, keep: list[str]) -> None:
    """Removes weights of an earlier save, which loading would otherwise prefer or mix in."""
    pattern = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for file in folder.iterdir():
        if pattern.fullmatch(file.name) and file.name not in keep:
            file.unlink()
