"""OLMo 3: OLMo 2 with three of four layers windowed, whose rotary positions are never stretched."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama, olmo2
from jaxalign.models.families.mapping import (
    activation,
    hf_ropes_of_kinds,
    layer_types,
    ropes_of_kinds,
    windowed,
)

ARCHITECTURE = "Olmo3ForCausalLM"
DEFAULTS = olmo2.DEFAULTS | {  # of transformers' Olmo3Config
    "rope_theta": 500_000.0,
    "sliding_window": 4096,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of an OLMo 3 `config.json`, old form or new."""
    hf = DEFAULTS | dict(hf)
    pattern = [(layer + 1) % 4 != 0 for layer in range(hf["num_hidden_layers"])]
    theta = float(hf["rope_theta"])
    full, local = ropes_of_kinds(hf, theta=theta, local_theta=theta)
    return DecoderConfig(
        family="olmo3",
        **llama.sizes(hf),
        norm_placement="post",
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        qk_norm="width",
        rope=full,
        local_rope=local,
        window=hf["sliding_window"],
        windowed=windowed(hf, pattern),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    fields = olmo2.hf_config(config) | hf_ropes_of_kinds(config)
    return fields | {"sliding_window": config.window, "layer_types": layer_types(config)}


weights = olmo2.weights
