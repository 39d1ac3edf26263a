"""Mixtral: Mistral with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama, qwen3_moe
from jaxalign.models.families.mapping import HF_ACTIVATIONS, Weight, activation, given, refuse

ARCHITECTURE = "MixtralForCausalLM"
ROUTER = "block_sparse_moe.gate.weight"
EXPERT = "block_sparse_moe.experts.{expert}.{matrix}.weight"
MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
DEFAULTS = llama.DEFAULTS | {  # of transformers' MixtralConfig
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Mixtral `config.json`."""
    refuse(hf, "layer_types", unless=None)
    refuse(hf, "router_jitter_noise", unless=0.0)
    number = hf.get("num_local_experts", hf.get("num_experts", DEFAULTS["num_local_experts"]))
    hf = DEFAULTS | dict(hf) | {"num_local_experts": number, "norm_topk_prob": True}
    window = given(hf, "sliding_window", None)
    return DecoderConfig(
        family="mixtral",
        **llama.sizes(hf),
        activation=activation(hf, "hidden_act"),
        rope=llama.plain_rope(hf),
        window=window,
        windowed=() if window is None else (True,) * hf["num_hidden_layers"],
        experts=qwen3_moe.experts(hf, number="num_local_experts", width="intermediate_size"),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    sizes = qwen3_moe.hf_experts(config, number="num_local_experts", width="intermediate_size")
    del sizes["norm_topk_prob"]  # it always divides
    return llama.hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "sliding_window": config.window,
        **sizes,
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"
    )
    mixture = qwen3_moe.expert_weights(ROUTER, EXPERT, MATRICES)
    return llama.outer_weights(config) + llama.attention_weights(config) + mixture + norms
