"""Qwen3: Llama with a norm on every head's queries and keys."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama, qwen2
from jaxalign.models.families.mapping import HF_ACTIVATIONS, Weight, activation

ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}  # of transformers' Qwen3Config


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Qwen3 `config.json`."""
    hf = DEFAULTS | dict(hf)
    return DecoderConfig(
        family="qwen3",
        **llama.sizes(hf),
        **qwen2.windows(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=bool(hf["attention_bias"]),
        output_bias=bool(hf["attention_bias"]),
        qk_norm="head",
        rope=llama.plain_rope(hf),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return qwen2.hf_config(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    return llama.weights(config) + norms
