"""OLMoE: a mixture of experts in every layer, and norms on queries and keys over all heads."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama, qwen3_moe
from jaxalign.models.families.mapping import HF_ACTIVATIONS, Weight, activation, refuse

ARCHITECTURE = "OlmoeForCausalLM"
SCORE_ARCHITECTURE = "OlmoeModel"
ROUTER, EXPERT, MATRICES = qwen3_moe.ROUTER, qwen3_moe.EXPERT, qwen3_moe.MATRICES
DEFAULTS = llama.DEFAULTS | {  # of transformers' OlmoeConfig
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of an OLMoE `config.json`."""
    refuse(hf, "clip_qkv", unless=None)
    number = hf.get("num_experts", hf.get("num_local_experts", DEFAULTS["num_experts"]))
    hf = DEFAULTS | dict(hf) | {"num_experts": number}
    return DecoderConfig(
        family="olmoe",
        **llama.sizes(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        qk_norm="width",
        rope=llama.plain_rope(hf),
        experts=qwen3_moe.experts(hf, number="num_experts", width="intermediate_size"),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return llama.hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        **qwen3_moe.hf_experts(config, number="num_experts", width="intermediate_size"),
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    return qwen3_moe.weights(config)
