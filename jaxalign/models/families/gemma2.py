"""Gemma 2: norms on both sides of each branch, soft caps, every other layer windowed."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    layer_types,
    number,
    refuse,
    windowed,
)

ARCHITECTURE = "Gemma2ForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' Gemma2Config
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def shared(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and Gemma 3 have in common."""
    refuse(hf, "use_bidirectional_attention", unless=False)
    return llama.sizes(hf) | {
        "norm_offset": 1.0,
        "norm_placement": "sandwich",
        "activation": activation(hf, "hidden_activation"),
        "qkv_bias": hf["attention_bias"],
        "output_bias": hf["attention_bias"],
        "window": hf["sliding_window"],
        "attention_softcap": number(hf["attn_logit_softcapping"]),
        "logit_softcap": number(hf["final_logit_softcapping"]),
        "embedding_scale": hf["hidden_size"] ** 0.5,
        "query_scale": hf["query_pre_attn_scalar"] ** -0.5,
    }


def hf_shared(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `shared`."""
    return llama.hf_sizes(config) | {
        "hidden_activation": HF_ACTIVATIONS[config.activation],
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        "sliding_window": config.window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "query_pre_attn_scalar": round(config.scale**-2),
        "layer_types": layer_types(config),
    }


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Gemma 2 `config.json`."""
    hf = DEFAULTS | dict(hf)
    if hf.get("use_bidirectional_attention") is None:
        hf["use_bidirectional_attention"] = False
    alternating = [layer % 2 == 0 for layer in range(hf["num_hidden_layers"])]
    return DecoderConfig(
        family="gemma2",
        **shared(hf),
        rope=llama.plain_rope(hf),
        windowed=windowed(hf, alternating),
    )


hf_config = hf_shared


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        attention_norm="input_layernorm",
        post_attention_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    )
    outer = llama.outer_weights(config)
    return outer + llama.attention_weights(config) + llama.mlp_weights(config) + norms
