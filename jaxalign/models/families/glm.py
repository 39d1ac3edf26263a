"""GLM-4 of 2024: half of each head rotated, its neighbours together; gate and up in one matrix."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    fused,
    given,
    linear,
)

ARCHITECTURE = "GlmForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' GlmConfig
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 0.00000015625,
    "attention_bias": True,
}
ROTATED = 0.5


def shared(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What both generations have in common."""
    rotated = float(given(hf, "partial_rotary_factor", ROTATED))
    return llama.sizes(hf) | {
        "activation": activation(hf, "hidden_act"),
        "qkv_bias": hf["attention_bias"],
        "rope": llama.plain_rope(hf, rotated=rotated, interleaved=True),
    }


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a GLM `config.json`."""
    return DecoderConfig(family="glm", **shared(DEFAULTS | dict(hf)))


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return llama.hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        "partial_rotary_factor": config.rope.rotated,
    }


def matrices(config: DecoderConfig) -> list[Weight]:
    """All tensors but the layers' norms."""
    mlp, sizes = "model.layers.{layer}.mlp", (config.mlp_width, config.mlp_width)
    gate_up = "layers/gate/kernel", "layers/up/kernel"
    return [
        *llama.outer_weights(config),
        *llama.attention_weights(config),
        fused(f"{mlp}.gate_up_proj.weight", gate_up, sizes, axis=0),
        *linear(f"{mlp}.down_proj", "layers/down", bias=False),
    ]


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"
    )
    return matrices(config) + norms
