"""Cohere 2 (Command R7B, Command A): both branches read one layer norm, which has no bias.

Windowed layers have rotary positions, which turn neighbouring entries together; the others have
none. Logits are scaled.
"""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    given,
    layer_types,
    refuse,
    windowed,
)

ARCHITECTURE = "Cohere2ForCausalLM"
SCORE_ARCHITECTURE = "Cohere2Model"
DEFAULTS = llama.DEFAULTS | {  # of transformers' Cohere2Config
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Cohere 2 `config.json`."""
    refuse(hf, "use_qk_norm", unless=False)
    hf = DEFAULTS | dict(hf)
    layers, every = hf["num_hidden_layers"], given(hf, "sliding_window_pattern", 4)
    local = windowed(hf, [(layer + 1) % every != 0 for layer in range(layers)])
    full = tuple(not one for one in local or (False,) * layers)
    # transformers derives a head's width, whatever the config says
    sizes = llama.sizes(hf | {"rms_norm_eps": hf["layer_norm_eps"], "head_dim": None})
    return DecoderConfig(
        family="cohere2",
        **sizes,
        norm="layer",
        norm_bias=False,
        norm_placement="shared",
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        rope=llama.plain_rope(hf, interleaved=True),
        unrotated=full if any(full) else (),
        window=hf["sliding_window"],
        windowed=local,
        logit_scale=float(hf["logit_scale"]),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    fields = llama.hf_sizes(config)
    return {name: value for name, value in fields.items() if name != "rms_norm_eps"} | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "logit_scale": config.logit_scale,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(attention_norm="input_layernorm")
    outer = llama.outer_weights(config)
    return outer + llama.attention_weights(config) + llama.mlp_weights(config) + norms
