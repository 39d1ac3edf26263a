"""SmolLM3: Llama, some of whose layers have no rotary positions."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import (
    activation,
    given,
    layer_types,
    windowed,
)

ARCHITECTURE = "SmolLM3ForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' SmolLM3Config
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layer_interval": 4,
}


def unrotated(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Per layer, whether it has no rotary positions: `no_rope_layers` has a 0 there."""
    layers, every = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    rotated = given(hf, "no_rope_layers", [int((n + 1) % every != 0) for n in range(layers)])
    if len(rotated) < layers or any(one not in (0, 1) for one in rotated):
        raise UserError(f"config.json: no_rope_layers: {rotated} is not a 0 or 1 for each layer")
    without = tuple(one == 0 for one in rotated[:layers])
    return without if any(without) else ()


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a SmolLM3 `config.json`."""
    hf = DEFAULTS | dict(hf)
    without, window = unrotated(hf), hf["sliding_window"]
    has_windows = hf["use_sliding_window"] and window is not None
    local = windowed(
        hf, [has_windows and one for one in without or [False] * hf["num_hidden_layers"]]
    )
    return DecoderConfig(
        family="smollm3",
        **llama.sizes(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        rope=llama.plain_rope(hf),
        unrotated=without,
        window=window if local else None,
        windowed=local,
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    without = config.unrotated or (False,) * config.layers
    return llama.hf_config(config) | {
        "no_rope_layers": [int(not one) for one in without],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
    }


weights = llama.weights
