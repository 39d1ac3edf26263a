"""OLMo 2: norms behind each branch, and on queries and keys over all heads at once."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import HF_ACTIVATIONS, Weight, activation

ARCHITECTURE = "Olmo2ForCausalLM"
SCORE_ARCHITECTURE = "Olmo2Model"
DEFAULTS = llama.DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5}  # of its Olmo2Config


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of an OLMo 2 `config.json`."""
    hf = DEFAULTS | dict(hf)
    return DecoderConfig(
        family="olmo2",
        **llama.sizes(hf),
        norm_placement="post",
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        qk_norm="width",
        rope=llama.plain_rope(hf),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return llama.hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    )
    outer = llama.outer_weights(config)
    return outer + llama.attention_weights(config) + llama.mlp_weights(config) + norms
