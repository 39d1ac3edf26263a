"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import HF_ACTIVATIONS, activation, layer_types, windowed

ARCHITECTURE = "Qwen2ForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' Qwen2Config
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers see a window: all from `max_window_layers` on, if windows are used at all."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    first = hf["max_window_layers"] if window is not None else hf["num_hidden_layers"]
    local = windowed(hf, [layer >= first for layer in range(hf["num_hidden_layers"])])
    return {"window": window if any(local) else None, "windowed": local}


def hf_windows(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `windows`."""
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": config.windowed.index(True) if config.windowed else config.layers,
        "layer_types": layer_types(config),
    }


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Qwen2 `config.json`."""
    hf = DEFAULTS | dict(hf)
    return DecoderConfig(
        family="qwen2",
        **llama.sizes(hf),
        **windows(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=True,
        rope=llama.plain_rope(hf),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    names = llama.hf_sizes(config) | hf_windows(config)
    return names | {"hidden_act": HF_ACTIVATIONS[config.activation]}


weights = llama.weights
