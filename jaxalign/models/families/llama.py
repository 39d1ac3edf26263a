"""Llama 2 and 3: the plain pre-norm decoder that most families vary."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig, Rope
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    given,
    head_width,
    linear,
    rope,
    rope_scaling,
    same,
    transposed,
)

ARCHITECTURE = "LlamaForCausalLM"
DEFAULTS = {  # of transformers' LlamaConfig, for fields that a config.json leaves out
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def sizes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all families of Llama's naming share."""
    heads = hf["num_attention_heads"]
    kv_heads = given(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"num_key_value_heads: {kv_heads} does not divide {heads} heads")
    own_width = hf.get("head_dim")
    if own_width is None:
        own_width = head_width(hf, width="hidden_size", heads="num_attention_heads")
    return {
        "vocab_size": hf["vocab_size"],
        "width": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": own_width,
        "mlp_width": hf["intermediate_size"],
        "context_length": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "tied": bool(hf["tie_word_embeddings"]),
        "initializer_range": hf["initializer_range"],
    }


def plain_rope(hf: Mapping[str, Any], *, rotated: float = 1.0, interleaved: bool = False) -> Rope:
    """The one `Rope` of a family whose layers all rotate alike."""
    parameters = given(hf, "rope_scaling", hf.get("rope_parameters"))
    theta = float(given(hf, "rope_theta", 10_000.0))
    return rope(hf, parameters, theta=theta, rotated=rotated, interleaved=interleaved)


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Llama `config.json`."""
    hf = DEFAULTS | dict(hf)
    return DecoderConfig(
        family="llama",
        **sizes(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        rope=plain_rope(hf),
    )


def hf_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `sizes`, with the rotary positions in the old form."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.initializer_range,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config.rope),
    }


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def attention_weights(config: DecoderConfig) -> list[Weight]:
    """The four matrices of a layer's attention."""
    prefix = "model.layers.{layer}.self_attn."
    table = [
        weight
        for name in "qkv"
        for weight in linear(f"{prefix}{name}_proj", f"layers/{name}", bias=config.qkv_bias)
    ]
    return table + linear(f"{prefix}o_proj", "layers/o", bias=config.output_bias)


def mlp_weights(config: DecoderConfig) -> list[Weight]:
    """The three matrices of a layer's gated MLP."""
    return [
        weight
        for name in ("gate", "up", "down")
        for weight in linear(
            f"model.layers.{{layer}}.mlp.{name}_proj", f"layers/{name}", bias=config.mlp_bias
        )
    ]


def norm_weights(**names: str) -> list[Weight]:
    """Norms of a layer: our name = theirs."""
    return [
        same(f"model.layers.{{layer}}.{theirs}.weight", f"layers/{ours}/scale")
        for ours, theirs in names.items()
    ]


def outer_weights(config: DecoderConfig) -> list[Weight]:
    """Embedding, final norm and the unembedding where it is not tied."""
    table = [
        same("model.embed_tokens.weight", "embed/embedding"),
        same("model.norm.weight", "final_norm/scale"),
    ]
    return table if config.tied else [*table, transposed("lm_head.weight", "unembed/kernel")]


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = norm_weights(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    return outer_weights(config) + attention_weights(config) + mlp_weights(config) + norms
