"""PEFT adapter folders, read and written under the module names of the weight tables."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.files import replacing, write_json
from jaxalign.models import lora
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.families import FAMILIES
from jaxalign.models.families.mapping import Weight
from jaxalign.models.folders import find_folder
from jaxalign.models.saving import to_host
from jaxalign.models.tensor_files import TensorFiles
from jaxalign.models.weights import flatten, model_class

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MERGED_ONLY = "adapter: not written, PEFT's folders hold no adapters of experts; they are merged in"
PREFIX = "base_model.model."
READ_FIELDS = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
CHECKED_FIELDS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other ways to begin (PiSSA, OLoRA, LoftQ, ...) change the base's weights too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Fields that do not change what the saved tensors mean.
IDLE_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """One adapted module of the Hugging Face model, in all its layers; it may fuse our matrices.

    Attributes:
      name: "model.layers.{layer}.self_attn.q_proj".
      paths: our matrices in it, "layers/q".
      layers: how many layers have it.
      inputs: of each of the matrices.
      outputs: of each matrix.
      weight: its entry in the family's table.
    """

    name: str
    paths: tuple[str, ...]
    layers: int
    inputs: int
    outputs: tuple[int, ...]
    weight: Weight

    @property
    def stored_transposed(self) -> bool:
        """Whether the file holds [outputs, inputs], as `torch.nn.Linear` does and Conv1D not."""
        one_input = [np.zeros((1, outputs), np.bool_) for outputs in self.outputs]
        return self.weight.join(*one_input).shape[0] != 1

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """B of each matrix, [rank, outputs], -> lora_B, [all outputs, rank]."""
        stored = self.weight.join(*parts)
        return stored if self.stored_transposed else stored.T

    def split(self, lora_b: np.ndarray) -> tuple[np.ndarray, ...]:
        """The reverse of `join`."""
        return self.weight.split(lora_b if self.stored_transposed else lora_b.T)


def modules(config: ModelConfig) -> list[Module]:
    """The modules of a model that can have an adapter, from its family's weight table."""
    shapes = flatten(model_class(config)[1])
    found = []
    for weight in FAMILIES[config.family].weights(config):
        if not (weight.stacked == 1 and all(path.endswith("/kernel") for path in weight.paths)):
            continue
        sizes = [shapes[path] for path in weight.paths]
        if len(sizes[0]) != 3:  # of experts
            continue
        found.append(
            Module(
                name=weight.name.removesuffix(".weight"),
                paths=tuple(path.removesuffix("/kernel") for path in weight.paths),
                layers=sizes[0][0],
                inputs=sizes[0][1],
                outputs=tuple(size[2] for size in sizes),
                weight=weight,
            )
        )
    return found


def unwritable(adapters: Mapping[str, Any]) -> list[str]:
    """The paths of adapters that PEFT's folders cannot hold: those of experts."""
    found = lora.items(adapters)
    return sorted(path for path, adapter in found.items() if adapter["a"].ndim > 3)


def save_adapters(
    folder: str | Path,
    adapters: Mapping[str, Any],
    config: ModelConfig,
    *,
    rank: int,
    alpha: float | int,
    dropout: float = 0.0,
    base_model: str | None = None,
    head: Mapping[str, Any] | None = None,
) -> Path:
    r"""Writes adapter_config.json and adapter_model.safetensors that PEFT opens.

    Where the Hugging Face model fuses matrices whose adapters have an A each, the fused adapter
    has the ranks' sum, and says so in `rank_pattern` and `alpha_pattern`; nothing is approximated:

    .. math:: x [W_q, W_k] + s \, x [A_q, A_k] \begin{bmatrix} B_q & 0 \\ 0 & B_k \end{bmatrix}

    Args:
      folder: made if absent.
      adapters: as `lora.init_adapters` makes them.
      config: the model's description.
      rank: of the adapters.
      alpha: their output is scaled by alpha / rank.
      dropout: written for whoever trains them further.
      base_model: name or folder of the model beneath, for PEFT to find it.
      head: a scalar head that was trained with the adapters; PEFT calls it a module to save.

    Returns:
      The folder.

    Raises:
      UserError: if an adapter is of a matrix that the family does not have, or of experts.
    """
    if stacked := unwritable(adapters):
        raise UserError(
            f"adapters: {', '.join(stacked)}: PEFT's folders have no adapters of single experts; "
            "write the merged model, or leave the experts out of lora.targets"
        )
    flat = {
        path: {name: to_host(adapter[name]).astype(np.float32) for name in ("a", "b")}
        for path, adapter in lora.items(adapters).items()
    }
    table = modules(config)
    strangers = set(flat) - {path for module in table for path in module.paths}
    if strangers:
        raise UserError(f"adapters: a {config.family} has no {', '.join(sorted(strangers))}")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    adapted = [module for module in table if any(path in flat for path in module.paths)]
    for module in adapted:
        a, parts = _fuse(module, [flat.get(path) for path in module.paths])
        ranks[module.name] = a.shape[-1]
        for layer in range(module.layers):
            name = PREFIX + module.name.format(layer=layer)
            lora_b = module.join([part[layer] for part in parts])
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[layer].T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(lora_b)
    kind = "CAUSAL_LM" if isinstance(config, DecoderConfig) else "SEQ_2_SEQ_LM"
    if head is not None:
        kind, kernel = "SEQ_CLS", to_host(head["kernel"])
        tensors[f"{PREFIX}score.weight"] = np.ascontiguousarray(kernel.T.astype(np.float32))
    rest = [module.name for module in table if module not in adapted]
    patterns = {
        _pattern(name, [other for other in ranks if ranks[other] != own]): own
        for name, own in ranks.items()
        if own != rank
    }
    fields = {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout,
        "target_modules": _target_modules([_pattern(name, rest) for name in ranks]),
        "rank_pattern": patterns,
        "alpha_pattern": {key: _whole(alpha * own / rank) for key, own in patterns.items()},
        "fan_in_fan_out": not all(module.stored_transposed for module in adapted),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None if head is None else ["score"],
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(folder)
    if jax.process_index() == 0:
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / TENSOR_FILE) as scratch:
            save_file(tensors, scratch, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, fields)
    return folder


def _fuse(
    module: Module, parts: Sequence[Mapping[str, np.ndarray] | None]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One A, [layers, inputs, rank], and the B of each matrix, [layers, rank, outputs], for it.

    The A is shared where all are equal; else they are concatenated, and each B is zero outside its
    own rows.
    """
    present = [part for part in parts if part is not None]
    first = present[0]["a"]
    if all(np.array_equal(part["a"], first) for part in present):
        ranks = [first.shape[-1] if part is present[0] else 0 for part in present]
        a, starts = first, [0] * len(present)
    else:
        ranks = [part["a"].shape[-1] for part in present]
        a = np.concatenate([part["a"] for part in present], axis=-1)
        starts = [sum(ranks[:number]) for number in range(len(ranks))]
    fused, at = [], iter(starts)
    for part, outputs in zip(parts, module.outputs, strict=True):
        b = np.zeros((module.layers, a.shape[-1], outputs), np.float32)
        if part is not None:
            start = next(at)
            b[:, start : start + part["b"].shape[1]] = part["b"]
        fused.append(b)
    return a, fused


def _pattern(name: str, others: Iterable[str]) -> str:
    """The shortest unique suffix of a module's name; a regular expression if there is none."""
    others = list(others)
    behind = name.split("{layer}.")[-1]
    for end in (name.split(".")[-1], behind):
        if not any(f".{other}".endswith(f".{end}") for other in others):
            return end
    return re.escape(name).replace(r"\{layer\}", r"\d+")


def _target_modules(patterns: Sequence[str]) -> list[str] | str:
    """Target modules for PEFT: suffixes of names, or one regular expression of the whole name."""
    if any("\\" in pattern for pattern in patterns):
        return rf"(.*\.)?({'|'.join(sorted(set(patterns)))})"
    return sorted(set(patterns))


def _whole(x: float | int) -> float | int:
    """PEFT writes whole alphas as integers."""
    return int(x) if x == int(x) else float(x)


def load_adapters(
    path_or_hub_name: str | Path, config: ModelConfig
) -> tuple[lora.Adapters, float, dict[str, Any]]:
    r"""Adapters from a folder that PEFT has written, in float32.

    Over a fused matrix the parts share their A. Ranks, alphas and layers that differ are made
    alike without changing what is computed: missing ranks and layers are zeros (which no gradient
    moves, since A and B are both zero there), other alphas are multiplied into B.

    Args:
      path_or_hub_name: folder with adapter_config.json and adapter_model.safetensors, or a name.
      config: the description of the model beneath.

    Returns:
      The adapters, their scale (alpha / r, or alpha / sqrt r for rsLoRA, arXiv:2312.03732) and the
      fields of adapter_config.json.

    Raises:
      UserError: if the folder is not a plain LoRA for this model; the message says why.
    """
    folder = find_folder(path_or_hub_name)
    fields = _read_fields(folder / CONFIG_FILE)
    tensors = _read_tensors(folder)
    scale = _scale(fields, "")
    flat: dict[str, dict[str, Any]] = {}
    for module in modules(config):
        flat |= _take(module, tensors, fields, scale, folder / TENSOR_FILE)
    if tensors:
        names = sorted(tensors)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"{folder / TENSOR_FILE}: {names[0]}{more}: not an adapter of a matrix in the layers "
            f"of a {config.family}, and these alone are supported"
        )
    return lora.nested(flat), scale, fields


def _read_fields(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; an adapter folder has it and {TENSOR_FILE}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(fields, dict) or not _is_rank(fields.get("r")):
        raise UserError(f"{file}: r: a rank of at least 1 is expected")
    if not _is_alpha(fields.get("lora_alpha", 8)):
        raise UserError(f"{file}: lora_alpha: {fields['lora_alpha']!r} is not a finite number")
    for field, fits, values in (
        ("rank_pattern", _is_rank, "a rank of at least 1"),
        ("alpha_pattern", _is_alpha, "a finite number"),
    ):
        patterns = fields.get(field) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: {field}: an object of patterns and numbers is expected")
        for pattern, value in patterns.items():
            _check_pattern(pattern, f"{file}: {field}")
            if not fits(value):
                raise UserError(f"{file}: {field}: {pattern}: {value!r} is not {values}")
    if isinstance(fields.get("target_modules"), str):
        _check_pattern(fields["target_modules"], f"{file}: target_modules")
    for field, value in fields.items():
        allowed = CHECKED_FIELDS.get(field)
        if allowed is not None:
            idle = value is None or value in allowed
        else:
            idle = field in READ_FIELDS | IDLE_FIELDS or not value
        if not idle:
            raise UserError(f"{file}: {field}: {value!r} is not supported, plain LoRA alone is")
    return fields


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _check_pattern(pattern: str, source: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise UserError(
            f"{source}: {pattern!r} is not a regular expression ({error}); write .* for any text"
        ) from None


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / TENSOR_FILE
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder}: only adapter_model.bin there; pickled weights can run code and are "
                f"refused, convert them to {TENSOR_FILE}"
            )
        raise UserError(f"{folder}: no {TENSOR_FILE}")
    files = TensorFiles([file])
    return {name: files.read(name) for name in files.shapes}


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the name as a regular expression."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def _scale(fields: Mapping[str, Any], name: str) -> float:
    """Alpha / rank of one module."""
    rank = _of_pattern(fields.get("rank_pattern"), name, fields["r"])
    alpha = _of_pattern(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _take(
    module: Module,
    tensors: dict[str, np.ndarray],
    fields: Mapping[str, Any],
    scale: float,
    file: Path,
) -> dict[str, dict[str, Any]]:
    """Our adapters of one module, whose tensors are removed from `tensors`."""
    pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for layer in range(module.layers):
        name = module.name.format(layer=layer)
        keys = [f"{PREFIX}{name}.lora_{letter}.weight" for letter in "AB"]
        if not any(key in tensors for key in keys):
            continue
        rank = _of_pattern(fields.get("rank_pattern"), name, fields["r"])
        shapes = [(rank, module.inputs), (sum(module.outputs), rank)]
        for key, shape in zip(keys, shapes, strict=True):
            if key not in tensors:
                raise UserError(f"{file}: {key}: missing")
            if tensors[key].shape != shape:
                there = list(tensors[key].shape)
                raise UserError(
                    f"{file}: {key}: shape {there}, but this model and {CONFIG_FILE} make it "
                    f"{list(shape)}"
                )
        lora_a, lora_b = (tensors.pop(key).astype(np.float32) for key in keys)
        own = _scale(fields, name)
        pairs[layer] = lora_a, lora_b if own == scale else lora_b * np.float32(own / scale)
    if not pairs:
        return {}
    rank = max(lora_a.shape[0] for lora_a, _ in pairs.values())
    a = np.zeros((module.layers, module.inputs, rank), np.float32)
    parts = [np.zeros((module.layers, rank, n), np.float32) for n in module.outputs]
    for layer, (lora_a, lora_b) in pairs.items():
        a[layer, :, : len(lora_a)] = lora_a.T
        for part, b in zip(parts, module.split(lora_b), strict=True):
            part[layer, : len(lora_a)] = b
    return {
        path: {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        for path, b in zip(module.paths, parts, strict=True)
    }
