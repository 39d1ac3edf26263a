"""GLM-4 of 2025 (GLM-4-0414): GLM with a norm on both sides of each branch."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import glm, llama
from jaxalign.models.families.mapping import Weight

ARCHITECTURE = "Glm4ForCausalLM"


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a GLM-4 `config.json`."""
    shared = glm.shared(glm.DEFAULTS | dict(hf))
    return DecoderConfig(family="glm4", norm_placement="sandwich", **shared)


hf_config = glm.hf_config


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        attention_norm="input_layernorm",
        post_attention_norm="post_self_attn_layernorm",
        mlp_norm="post_attention_layernorm",
        post_mlp_norm="post_mlp_layernorm",
    )
    return glm.matrices(config) + norms
