"""Phi-3: Llama with fused matrices and, for long contexts, a factor per rotary dimension."""

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

ARCHITECTURE = "Phi3ForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' Phi3Config
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Phi-3 `config.json`."""
    hf = DEFAULTS | dict(hf)
    parameters = dict(given(hf, "rope_scaling", given(hf, "rope_parameters", {})))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    # Early checkpoints say "su" or "yarn" and mean longrope, as transformers reads them.
    parameters["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    hf |= {"rope_scaling": None, "rope_parameters": parameters}
    window = hf["sliding_window"]
    return DecoderConfig(
        family="phi3",
        **llama.sizes(hf),
        activation=activation(hf, "hidden_act"),
        rope=llama.plain_rope(hf, rotated=float(given(hf, "partial_rotary_factor", 1.0))),
        window=window,
        windowed=() if window is None else (True,) * hf["num_hidden_layers"],
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    context = config.rope.original_context or config.context_length
    fields = llama.hf_sizes(config)
    if fields["rope_scaling"] is not None:
        # Phi-3 keeps the length beside the dict, and older readers insist on the word "type".
        del fields["rope_scaling"]["original_max_position_embeddings"]
        fields["rope_scaling"]["type"] = fields["rope_scaling"].pop("rope_type")
    return fields | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "original_max_position_embeddings": context,
        "partial_rotary_factor": config.rope.rotated,
        "sliding_window": config.window,
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    prefix = "model.layers.{layer}."
    return [
        *llama.outer_weights(config),
        fused(
            f"{prefix}self_attn.qkv_proj.weight",
            ("layers/q/kernel", "layers/k/kernel", "layers/v/kernel"),
            (q, kv, kv),
            axis=0,
        ),
        *linear(f"{prefix}self_attn.o_proj", "layers/o", bias=False),
        fused(
            f"{prefix}mlp.gate_up_proj.weight",
            ("layers/gate/kernel", "layers/up/kernel"),
            (config.mlp_width, config.mlp_width),
            axis=0,
        ),
        *linear(f"{prefix}mlp.down_proj", "layers/down", bias=False),
        *llama.norm_weights(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    ]
