"""Granite 4: its dense models; those with Mamba layers or experts are refused."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import granite, llama
from jaxalign.models.families.mapping import HF_ACTIVATIONS, Weight, activation, fused, linear

ARCHITECTURE = "GraniteMoeHybridForCausalLM"
SCORE_ARCHITECTURE = "GraniteMoeHybridModel"
DEFAULTS = granite.DEFAULTS | {  # of transformers' GraniteMoeHybridConfig
    "shared_intermediate_size": 1024,
    "position_embedding_type": None,
}
# Without experts and Mamba layers; transformers checks the sizes of these nevertheless.
ABSENT = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 1,
    "mamba_d_head": "auto",
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a dense Granite 4 `config.json`."""
    hf = DEFAULTS | dict(hf)
    hf["intermediate_size"] = hf["shared_intermediate_size"]
    layers = hf["num_hidden_layers"]
    types = hf.get("layer_types") or hf.get("layers_block_type") or ["mamba"] * layers
    if set(types) - {"attention", "full_attention"} or len(types) != layers:
        raise UserError(
            "config.json: layer_types: Mamba layers are not supported; Granite 4's dense models "
            "have attention in every layer"
        )
    if hf.get("num_local_experts", 8):
        raise UserError(
            f"config.json: num_local_experts: {hf.get('num_local_experts', 8)} experts are not "
            "supported; Granite 4's dense models have 0"
        )
    rotated = hf["position_embedding_type"]
    if rotated not in ("rope", None, "nope"):
        raise UserError(
            f"config.json: position_embedding_type: {rotated!r} is not supported, 'rope' and null "
            "are"
        )
    return DecoderConfig(
        family="granitemoehybrid",
        **llama.sizes(hf),
        **granite.multipliers(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        rope=llama.plain_rope(hf),
        unrotated=() if rotated == "rope" else (True,) * layers,
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    fields = llama.hf_sizes(config) | granite.hf_multipliers(config) | ABSENT
    del fields["intermediate_size"]  # of the experts
    return fields | {
        "shared_intermediate_size": config.mlp_width,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        "layer_types": ["attention"] * config.layers,
        "position_embedding_type": None if config.unrotated else "rope",
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    mlp, sizes = "model.layers.{layer}.shared_mlp", (config.mlp_width, config.mlp_width)
    gate_up = "layers/gate/kernel", "layers/up/kernel"
    norms = llama.norm_weights(
        attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"
    )
    return [
        *llama.outer_weights(config),
        *llama.attention_weights(config),
        fused(f"{mlp}.input_linear.weight", gate_up, sizes, axis=0),
        *linear(f"{mlp}.output_linear", "layers/down", bias=False),
        *norms,
    ]
