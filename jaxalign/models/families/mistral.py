"""Mistral: Llama whose every layer sees a sliding window."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import HF_ACTIVATIONS, activation, refuse

ARCHITECTURE = "MistralForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' MistralConfig
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Mistral `config.json`."""
    refuse(hf, "layer_types", unless=None)
    hf = DEFAULTS | dict(hf)
    window = hf["sliding_window"]
    return DecoderConfig(
        family="mistral",
        **llama.sizes(hf),
        activation=activation(hf, "hidden_act"),
        rope=llama.plain_rope(hf),
        window=window,
        windowed=() if window is None else (True,) * hf["num_hidden_layers"],
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return llama.hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "sliding_window": config.window,
    }


weights = llama.weights
