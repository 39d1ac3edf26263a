"""Architectures of llama.cpp: how their metadata and tensors correspond to Hugging Face's."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.gguf import GGUF, read_tensor
from jaxalign.models.config import Rope
from jaxalign.models.families.mapping import rope
from jaxalign.models.rope import rope_frequencies

PATTERN = "attention.sliding_window_pattern"
LAYER_NORM = "attention.layer_norm_epsilon"
LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
PARTS = re.compile(r"\.(q|k)_proj\.|\.(query_key_value)\.")
OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BRANCHES = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
PRE_NORM = BRANCHES | {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORM = BRANCHES | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
SANDWICH = POST_NORM | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
GLM = BRANCHES | {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}
# Tensors that say how positions are rotated; they become fields of the config.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 to 3.3; the files keep the factors that follow from it.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Settings that change what a model computes; an architecture names those that it has.
REFUSED = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "rope.dimension_sections",
)
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """One model's metadata, its architecture's prefix left out."""

    file: GGUF
    architecture: str

    def __call__(self, name: str, otherwise: Any = None) -> Any:
        """The value, `otherwise` where there is none; one for all layers."""
        value = self.file.metadata.get(f"{self.architecture}.{name}", otherwise)
        if isinstance(value, list) and value and len(set(value)) == 1:
            return value[0]
        return value

    def number(self, name: str, otherwise: Any = None) -> Any:
        """A number that the file must have, or else `otherwise`."""
        value = self(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "missing" if value is None else f"{value!r} is not one number"
            raise UserError(f"{self.file.file}: {self.architecture}.{name}: {found}")
        return shortest(value)

    def stored(self, name: str) -> bool:
        """Whether the file has a tensor."""
        return name in self.file.tensors

    def vector(self, name: str) -> list[float]:
        """A tensor's numbers."""
        return [shortest(float(x)) for x in read_tensor(self.file.tensors[name])]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp keeps one of our families.

    Attributes:
      family: the name in the table of families.
      config: metadata -> the fields of config.json that the family reads.
      outer: names of the tensors outside the layers, llama.cpp's to Hugging Face's.
      layers: names within a layer.
      prefix: of a layer's names; "{layer}" stands for its number.
      permuted: whether queries and keys are kept with the two halves of a head interleaved.
      norm_offset: what is added to the norms' weights in the file.
      transposed: the ends of names of matrices kept transposed.
      settings: those of `REFUSED` that its `config` reads.
    """

    family: str
    config: Callable[[Metadata], Fields]
    outer: Mapping[str, str] = dataclasses.field(default_factory=lambda: OUTER)
    layers: Mapping[str, str] = dataclasses.field(default_factory=lambda: PRE_NORM)
    prefix: str = "model.layers.{layer}."
    permuted: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def name(self, stored: str) -> str:
        """The Hugging Face name of a tensor; its own where there is none."""
        stem, _, kind = stored.rpartition(".")
        match = LAYER.fullmatch(stored)
        if match is None:
            return f"{self.outer[stem]}.{kind}" if stem in self.outer else stored
        if match[2] not in self.layers:
            return stored
        return f"{self.prefix.format(layer=match[1])}{self.layers[match[2]]}.{match[3]}"

    def stored(self, name: str) -> str:
        """The reverse of `name`, for names with "{layer}" in place of a layer's number."""
        stem, _, kind = name.rpartition(".")
        inner = stem.removeprefix(self.prefix)
        lead, table = ("", self.outer) if inner == stem else ("blk.{layer}.", self.layers)
        names = {ours: theirs for theirs, ours in table.items()}
        return f"{lead}{names[inner]}.{kind}"

    def arranged(self, name: str, x: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
        """A tensor as llama.cpp keeps it: the reverse of `GGUFTensors.read`.

        Args:
          name: its Hugging Face name.
          x: the tensor.
          heads: of queries.
          kv_heads: of keys and values.
        """
        if self.transposed and name.endswith(self.transposed):
            return x.T
        if self.norm_offset and name.endswith("norm.weight"):
            return x + np.float32(self.norm_offset)
        part = PARTS.search(name)
        if part is None or not (self.permuted or part[2]):
            return x
        if part[2]:
            return in_parts(x, heads)
        return in_pairs(x, heads if part[1] == "q" else kv_heads)


def shortest(value: Any) -> Any:
    """1e-05 rather than 9.999999747378752e-06: the shortest decimal of a float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama_like(meta: Metadata) -> Fields:
    """The fields that all families of Llama's naming share."""
    heads, width = meta.number("attention.head_count"), meta.number("embedding_length")
    head = meta.number("attention.key_length", width // heads)
    return {
        "hidden_size": width,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.number("attention.head_count_kv", heads),
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": meta.number("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon", meta(LAYER_NORM)),
        "rope_theta": shortest(meta("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(meta, head),
        "attention_bias": meta.stored("blk.0.attn_q.bias"),
    }


def _rope_scaling(meta: Metadata, head: int) -> Fields | None:
    """The dict of a config's rotary variant; None is the plain one."""
    rotated = meta("rope.dimension_count", head)
    if rotated != head and meta.architecture not in ("phi3", "gptneox", "glm4"):
        refuse(meta, "rope.dimension_count", rotated, f"heads are {head} wide")
    kind, factor = meta("rope.scaling.type"), meta("rope.scaling.factor", 0.0)
    if kind is None:
        factor = factor or meta("rope.scale_linear", 0.0)
        kind = "linear" if factor else "none"
    if meta.stored("rope_factors_long.weight"):
        return _longrope(meta)
    if meta.stored("rope_freqs.weight"):
        return _stretched(meta, meta.vector("rope_freqs.weight"), rotated)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind not in ("linear", "yarn"):
        refuse(meta, "rope.scaling.type", kind, "linear and yarn are supported")
    scaling = {"rope_type": kind, "factor": shortest(float(factor))}
    if kind == "linear":
        return scaling
    context = meta("rope.scaling.original_context_length", meta.number("context_length"))
    scaling["original_max_position_embeddings"] = context
    for theirs, ours in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        value = meta(f"rope.scaling.{theirs}")
        if value is not None:
            scaling[ours] = shortest(value)
    return scaling


def _longrope(meta: Metadata) -> Fields:
    """One factor per dimension, in a short and a long set (Phi-3)."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": meta.vector("rope_factors_short.weight"),
        "long_factor": meta.vector("rope_factors_long.weight"),
    }
    if meta("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = shortest(meta("rope.scaling.attn_factor"))
    return scaling


def _stretched(meta: Metadata, factors: list[float], rotated: int) -> Fields | None:
    """One factor per dimension, whatever the length: Llama 3's, or a longrope of one set."""
    if all(factor == 1 for factor in factors):
        return None
    theta, context = meta("rope.freq_base", 10_000.0), meta.number("context_length")
    plain = Rope(theta=theta)
    llama3 = {"rope_type": "llama3", "factor": max(factors)} | LLAMA3
    scaled = rope({"max_position_embeddings": context}, llama3, theta=theta)
    kept, slowed = (rope_frequencies(x, rotated, context, 1)[0] for x in (plain, scaled))
    if np.allclose(np.asarray(kept) / np.asarray(slowed), factors, rtol=1e-5):
        return llama3
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def refuse(meta: Metadata, name: str, value: Any, reason: str) -> None:
    """Raise `UserError`: a field has a value that is not supported."""
    raise UserError(
        f"{meta.file.file}: {meta.architecture}.{name}: {value!r} is not supported; {reason}"
    )


def _llama(meta: Metadata) -> Fields:
    window = meta("attention.sliding_window")
    fields = _llama_like(meta) | {"mlp_bias": meta.stored("blk.0.ffn_up.bias")}
    return fields | ({"model_type": "mistral", "sliding_window": window} if window else {})


def _no_window(meta: Metadata) -> Fields:
    window = meta("attention.sliding_window")
    if window:
        refuse(meta, "attention.sliding_window", window, "no layer of this family has a window")
    return _llama_like(meta)


def _phi3(meta: Metadata) -> Fields:
    fields = _llama_like(meta)
    context = fields["max_position_embeddings"]
    return fields | {
        "original_max_position_embeddings": meta("rope.scaling.original_context_length", context),
        "partial_rotary_factor": meta("rope.dimension_count", fields["head_dim"])
        / fields["head_dim"],
        "sliding_window": meta("attention.sliding_window") or None,
    }


def _layer_types(meta: Metadata, every: int) -> list[str]:
    """Which layers have a window: all but every so many, if the file does not say."""
    layers = meta.number("block_count")
    pattern: Any = meta.file.metadata.get(f"{meta.architecture}.{PATTERN}", every)
    if not isinstance(pattern, list):
        pattern = [layer % pattern < pattern - 1 for layer in range(layers)]
    return ["sliding_attention" if local else "full_attention" for local in pattern[:layers]]


def _olmo2(meta: Metadata) -> Fields:
    """OLMo 2, and OLMo 3, which has windows."""
    window = meta("attention.sliding_window")
    if not window:
        return _llama_like(meta)
    return _llama_like(meta) | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(meta, every=4),
    }


def _smollm3(meta: Metadata) -> Fields:
    """llama.cpp has a fixed step for the layers without rotary positions."""
    return _no_window(meta) | {
        "no_rope_layer_interval": 4,
        "mlp_bias": meta.stored("blk.0.ffn_up.bias"),
    }


def _granite(meta: Metadata) -> Fields:
    """Granite 3, and the dense models of Granite 4, which llama.cpp converts to it."""
    if meta("rope.scaling.finetuned") is False:
        refuse(meta, "rope.scaling.finetuned", False, "every layer has rotary positions")
    fields = _no_window(meta)
    scale = meta("attention.scale") or fields["head_dim"] ** -0.5
    return fields | {
        "mlp_bias": meta.stored("blk.0.ffn_up.bias"),
        "attention_multiplier": shortest(scale),
        "embedding_multiplier": shortest(meta("embedding_scale") or 1.0),
        "residual_multiplier": shortest(meta("residual_scale") or 1.0),
        "logits_scaling": shortest(meta("logit_scale") or 1.0),
    }


def _glm4(meta: Metadata) -> Fields:
    fields = _no_window(meta)
    rotated = meta("rope.dimension_count", fields["head_dim"])
    return fields | {"partial_rotary_factor": rotated / fields["head_dim"]}


def _cohere2(meta: Metadata) -> Fields:
    fields = _llama_like(meta)
    return fields | {
        "layer_norm_eps": fields["rms_norm_eps"],
        "logit_scale": meta.number("logit_scale"),
        "sliding_window": meta.number("attention.sliding_window"),
        "layer_types": _layer_types(meta, every=4),
    }


def _gemma1(meta: Metadata) -> Fields:
    return _no_window(meta) | {"hidden_act": "gelu_pytorch_tanh"}


def _gemma(meta: Metadata, every: int, largest: int) -> Fields:
    """Gemma 2 and 3; the largest of each scales queries by its width and not by the heads'."""
    fields = _llama_like(meta)
    scalar = fields["head_dim"]
    if fields["num_hidden_layers"] == largest:
        scalar = fields["hidden_size"] // fields["num_attention_heads"]
    if meta("attention.scale"):
        scalar = round(meta("attention.scale") ** -2)
    return fields | {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": meta("attention.sliding_window", 4096),
        "layer_types": _layer_types(meta, every),
        "attn_logit_softcapping": shortest(meta("attn_logit_softcapping", 0.0)) or None,
        "final_logit_softcapping": shortest(meta("final_logit_softcapping", 0.0)) or None,
    }


def _gemma2(meta: Metadata) -> Fields:
    fields = _gemma(meta, every=2, largest=46)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    missing = {name: cap for name, cap in caps.items() if meta(name) is None}
    return fields | missing


def _gemma3(meta: Metadata) -> Fields:
    fields = _gemma(meta, every=6, largest=62)
    theta = meta("rope.freq_base", 1_000_000.0)
    local = meta("rope.freq_base_swa", 10_000.0)
    return fields | {"rope_theta": shortest(theta), "rope_local_base_freq": shortest(local)}


def _gpt2(meta: Metadata) -> Fields:
    return {
        "n_embd": meta.number("embedding_length"),
        "n_layer": meta.number("block_count"),
        "n_head": meta.number("attention.head_count"),
        "n_positions": meta.number("context_length"),
        "n_inner": meta.number("feed_forward_length"),
        "layer_norm_epsilon": meta.number(LAYER_NORM),
        "activation_function": "gelu_new",
    }


def _gpt_neox(meta: Metadata) -> Fields:
    heads, width = meta.number("attention.head_count"), meta.number("embedding_length")
    return {
        "hidden_size": width,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.number("block_count"),
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "max_position_embeddings": meta.number("context_length"),
        "layer_norm_eps": meta.number(LAYER_NORM),
        "use_parallel_residual": bool(meta("use_parallel_residual", True)),
        "attention_bias": meta.stored("blk.0.attn_qkv.bias"),
        "rotary_emb_base": shortest(meta("rope.freq_base", 10_000.0)),
        "rotary_pct": meta("rope.dimension_count", width // heads) / (width // heads),
        "rope_scaling": _rope_scaling(meta, width // heads),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, permuted=True),
    "qwen2": Architecture("qwen2", _no_window),
    "qwen3": Architecture("qwen3", _no_window),
    "phi3": Architecture("phi3", _phi3, layers=PRE_NORM | {"ffn_up": "mlp.gate_up_proj"}),
    "olmo2": Architecture("olmo2", _olmo2, layers=POST_NORM),
    "smollm3": Architecture("smollm3", _smollm3, permuted=True),
    "granite": Architecture(
        "granite",
        _granite,
        permuted=True,
        settings=("logit_scale", "residual_scale", "embedding_scale"),
    ),
    "glm4": Architecture("glm4", _glm4, layers=GLM),
    "cohere2": Architecture("cohere2", _cohere2, settings=("logit_scale",)),
    "gemma": Architecture("gemma", _gemma1, norm_offset=1.0),
    "gemma2": Architecture("gemma2", _gemma2, layers=SANDWICH, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _gemma3, layers=SANDWICH, norm_offset=1.0),
    "gpt2": Architecture(
        "gpt2",
        _gpt2,
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers={
            "attn_norm": "ln_1",
            "ffn_norm": "ln_2",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        prefix="transformer.h.{layer}.",
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
    "gptneox": Architecture(
        "gpt_neox",
        _gpt_neox,
        outer={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        layers={
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        prefix="gpt_neox.layers.{layer}.",
    ),
}


def halved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows (pair, half) of every head -> (half, pair), the reverse of llama.cpp's permutation."""
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def in_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of `_halved`."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows (part, head, entry) -> (head, part, entry): GPT-NeoX's queries, keys and values."""
    parts = x.reshape(3, heads, x.shape[0] // heads // 3, *x.shape[1:])
    return parts.swapaxes(0, 1).reshape(x.shape)


def in_parts(x: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of `_interleaved`."""
    own = x.reshape(heads, 3, x.shape[0] // heads // 3, *x.shape[1:])
    return own.swapaxes(0, 1).reshape(x.shape)
