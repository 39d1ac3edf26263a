"""Models written as GGUF files, which llama.cpp runs: the reverse of `jaxalign.models.gguf`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError, notice
from jaxalign.files import replacing
from jaxalign.gguf import FORMATS, NewTensor, write_gguf
from jaxalign.models.config import DecoderConfig, ModelConfig, Rope
from jaxalign.models.families import FAMILIES, granite
from jaxalign.models.families.mapping import Weight
from jaxalign.models.gguf import config_fields
from jaxalign.models.gguf_architectures import ARCHITECTURES, LAYER_NORM, PATTERN, Architecture
from jaxalign.models.rope import llama3_frequencies, rope_frequencies
from jaxalign.models.saving import Place, leaf_items, save_plan, to_host

Fields = dict[str, Any]
# Families that llama.cpp keeps as another one, with some of its settings.
KEPT_AS = {"mistral": "llama", "olmo3": "olmo2", "granitemoehybrid": "granite"}
NAMES = {one.family: name for name, one in ARCHITECTURES.items()}
WRITTEN = NAMES | {ours: NAMES[theirs] for ours, theirs in KEPT_AS.items()}
"""Families that can be written -> llama.cpp's architecture."""
UNREAD = ("family", "source", "initializer_range", "tied")
"""Fields of a config that shape no model, or (`tied`) that the tensors show."""
QUANTISED_ROW = 32


def gguf_architecture(config: ModelConfig) -> str:
    """llama.cpp's name of a model's architecture.

    Raises:
      UserError: the family cannot be written as GGUF.
    """
    if config.family not in WRITTEN:
        raise UserError(
            f"model_type: {config.family!r} cannot be written as GGUF; {', '.join(sorted(WRITTEN))}"
            " can"
        )
    return WRITTEN[config.family]


def save_gguf(model: Any, file: str | Path, *, format: str, metadata: Mapping[str, Any]) -> Path:
    """Writes a GGUF file as llama.cpp's converter does; one tensor is held at a time.

    Vectors and learned positions are in float32. In q8_0, each 32 numbers of a row have a common
    factor; matrices whose rows are no multiples of 32 are written in float16.

    Args:
      model: a `Decoder`, or anything with its `config` and `params`.
      file: to write; replaced once it is complete, and reads back as the same architecture.
      format: of the matrices, one of `FORMATS`.
      metadata: keys and values beyond those of the architecture: the tokenizer and the name.

    Returns:
      The file.

    Raises:
      UserError: GGUF cannot express this model.
    """
    file, config = Path(file), model.config
    name = gguf_architecture(config)
    if "score" in model.params:
        raise UserError(f"{file}: a reward model has no form in GGUF; write a folder")
    fields, factors = _described(config, name)
    tensors = [*_vectors(factors), *_tensors(model, ARCHITECTURES[name], format)]
    coarse = [one.name for one in tensors if format == "q8_0" and one.format == "f16"]
    if coarse:
        notice(
            f"{file}: {len(coarse)} matrices such as {coarse[0]} are written in f16: their rows "
            f"are no multiples of {QUANTISED_ROW}"
        )
    general = {"general.type": "model", "general.file_type": _file_type(format)}
    general["general.quantization_version"] = _library().GGML_QUANT_VERSION
    own = {f"{name}.{key}": value for key, value in fields.items()}
    with replacing(file) as scratch:
        write_gguf(scratch, name, general | own | dict(metadata), tensors)
        _check(scratch, config, name)
    return file


def _library() -> Any:
    import gguf

    return gguf


def _file_type(format: str) -> int:
    return int(_library().LlamaFileType[FORMATS[format]])


def _tensors(model: Any, architecture: Architecture, format: str) -> list[NewTensor]:
    """The tensors of a model in llama.cpp's names and order, which are read when written."""
    config, params = model.config, dict(leaf_items(model.params))
    shapes = {path: leaf.shape for path, leaf in params.items()}
    tensors = []
    for name, weight, place in save_plan(FAMILIES[architecture.family].weights(config), shapes):
        parts = [np.empty(shapes[path][weight.stacked :], np.bool_) for path in weight.paths]
        shape = weight.join(*parts).shape
        if architecture.transposed and name.endswith(architecture.transposed):
            shape = shape[::-1]
        stored = architecture.stored(weight.name).format(layer=place[0] if place else None)
        values = functools.partial(_values, params, weight, place, architecture, config)
        kind = _format(stored, shape, format)
        tensors.append(NewTensor(name=stored, shape=shape, format=kind, values=values))
    return tensors


def _values(
    params: Mapping[str, Any],
    weight: Weight,
    place: Place,
    architecture: Architecture,
    config: DecoderConfig,
) -> np.ndarray:
    """One tensor's numbers in float32."""
    joined = weight.join(*(to_host(params[path], place) for path in weight.paths))
    x = joined.astype(np.float32, copy=False)
    return architecture.arranged(weight.name, x, config.heads, config.kv_heads)


def _format(name: str, shape: Sequence[int], format: str) -> str:
    """The format of a tensor in a file whose matrices have another or the same one."""
    if len(shape) == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if format == "q8_0" and shape[-1] % QUANTISED_ROW else format


def _vectors(factors: Mapping[str, np.ndarray]) -> list[NewTensor]:
    return [
        NewTensor(name=name, shape=x.shape, format="f32", values=functools.partial(np.asarray, x))
        for name, x in factors.items()
    ]


def _described(config: DecoderConfig, name: str) -> tuple[Fields, dict[str, np.ndarray]]:
    """The metadata of an architecture, without its name, and the tensors of rotary factors."""
    norm = LAYER_NORM if config.norm == "layer" else "attention.layer_norm_rms_epsilon"
    fields: Fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        norm: config.norm_eps,
    }
    factors: dict[str, np.ndarray] = {}
    if config.position_kind == "rope":
        scaling, factors = _rotary(config, name)
        fields |= scaling
    return fields | OWN.get(name, lambda _: {})(config), factors


def _rotary(config: DecoderConfig, name: str) -> tuple[Fields, dict[str, np.ndarray]]:
    """Rotary positions: metadata, and what each frequency is divided by."""
    one, head = config.rope, config.head_width
    rotated = int(head * one.rotated)
    fields: Fields = {"rope.freq_base": one.theta, "rope.dimension_count": rotated}
    attention = rope_frequencies(one, head, config.context_length, 1)[1]
    factors: dict[str, np.ndarray] = {}
    if one.kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": one.factor}
    elif one.kind == "yarn":
        assert one.original_context is not None
        factor = float(one.factor or config.context_length / one.original_context)
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
        fields["rope.scaling.original_context_length"] = one.original_context
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        if abs(attention - usual) > 1e-6:
            fields["rope.scaling.yarn_attn_factor"] = float(attention)
        betas = {"yarn_beta_fast": one.beta_fast, "yarn_beta_slow": one.beta_slow}
        given = {key: value for key, value in betas.items() if value is not None}
        fields |= {f"rope.scaling.{key}": value for key, value in given.items()}
    elif one.kind == "llama3":
        plain = one.theta ** -(np.arange(0, rotated, 2) / rotated)
        factors["rope_freqs.weight"] = plain / llama3_frequencies(one, plain)
    elif one.kind == "longrope" and one.short_factor == one.long_factor and attention == 1:
        factors["rope_freqs.weight"] = np.asarray(one.short_factor)
    elif one.kind == "longrope":
        fields["rope.scaling.attn_factor"] = float(attention)
        for length in ("long", "short"):
            key = f"rope_factors_{length}.weight"
            factors[key] = np.asarray(getattr(one, f"{length}_factor"))
    elif one.kind != "default":
        raise UserError(f"rope: {one.kind!r} has no key in GGUF")
    library = _library()
    known = library.MODEL_TENSORS[library.MODEL_ARCH[name.upper()]]
    there = {f"{library.TENSOR_NAMES[tensor]}.weight" for tensor in known}
    if not factors.keys() <= there:
        raise UserError(f"rope: {one.kind!r} cannot be written for llama.cpp's {name}")
    return fields, factors


def _windows(config: DecoderConfig, *, every: int | None = None) -> Fields:
    """The window, and the layers that have it where these are not all but every so many.

    Args:
      config: of the model.
      every: the period that llama.cpp takes where the file has none; None: all layers are alike.
    """
    if not config.windowed:
        return {}
    fields: Fields = {"attention.sliding_window": config.window}
    if every is None:
        return fields
    periods = [every, *range(1, config.layers + 1)]
    fitting = [n for n in periods if config.windowed == _pattern(n, config.layers)]
    if fitting[:1] == [every]:
        return fields
    return fields | {PATTERN: fitting[0] if fitting else list(config.windowed)}


def _pattern(every: int, layers: int) -> tuple[bool, ...]:
    return tuple(layer % every < every - 1 for layer in range(layers))


def _phi3(config: DecoderConfig) -> Fields:
    original = config.rope.original_context or config.context_length
    window = {"attention.sliding_window": config.window or 0}
    return window | {"rope.scaling.original_context_length": original}


def _granite(config: DecoderConfig) -> Fields:
    factors = granite.hf_multipliers(config)
    return {
        "attention.scale": factors["attention_multiplier"],
        "embedding_scale": factors["embedding_multiplier"],
        "residual_scale": factors["residual_multiplier"],
        "logit_scale": factors["logits_scaling"],
    }


def _cohere2(config: DecoderConfig) -> Fields:
    own = {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
    return own | _windows(config, every=4)


def _gemma2(config: DecoderConfig) -> Fields:
    return {
        "attention.scale": config.scale,
        "attn_logit_softcapping": config.attention_softcap or 0.0,
        "final_logit_softcapping": config.logit_softcap or 0.0,
    } | _windows(config, every=2)


def _gemma3(config: DecoderConfig) -> Fields:
    caps = {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    return {
        "attention.scale": config.scale,
        "rope.freq_base_swa": (config.local_rope or config.rope).theta,
        **{key: cap for key, cap in caps.items() if cap is not None},
        **_windows(config, every=6),
    }


OWN: dict[str, Callable[[DecoderConfig], Fields]] = {
    "llama": _windows,
    "phi3": _phi3,
    "olmo2": functools.partial(_windows, every=4),
    "granite": _granite,
    "cohere2": _cohere2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gptneox": lambda config: {"use_parallel_residual": config.norm_placement == "parallel"},
}
"""Architecture -> the metadata that it has beyond what all have."""


def _check(file: Path, config: DecoderConfig, name: str) -> None:
    """Check that a written file reads back as the same architecture.

    Raises:
      UserError: a field for which GGUF has no key has another value than the one it means.
    """
    fields = config_fields(file)
    found = FAMILIES[fields["model_type"]].config(fields)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(found, field.name)
        if field.name in UNREAD or ours == theirs:
            continue
        if isinstance(ours, Rope) and isinstance(theirs, Rope):
            if _alike(ours, theirs, config):
                continue
            raise UserError(
                f"{field.name}: GGUF's {name} has no keys for all settings of this {ours.kind!r}"
            )
        raise UserError(
            f"{field.name}: {ours!r} cannot be written; in GGUF's {name} it is {theirs!r}"
        )


def _alike(one: Rope, other: Rope, config: DecoderConfig) -> bool:
    """Whether two rotary variants rotate by the same angles."""
    if (one.rotated, one.interleaved) != (other.rotated, other.interleaved):
        return False
    context = config.context_length
    for length in (1, context):
        ours, theirs = (
            rope_frequencies(x, config.head_width, context, length) for x in (one, other)
        )
        frequencies = np.allclose(ours[0], theirs[0], rtol=1e-5, atol=0)
        if not (frequencies and math.isclose(ours[1], theirs[1], rel_tol=1e-6)):
            return False
    return True
