"""gpt-oss: experts with biases and a clamped gate, and heads that may attend to nothing."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import ClampedSwiGLU, DecoderConfig, Experts
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import (
    Weight,
    interleaved,
    layer_types,
    linear,
    rope_scaling,
    same,
    windowed,
)
from jaxalign.models.families.qwen3_moe import mixture_of

ARCHITECTURE = "GptOssForCausalLM"
PACKED = ("mxfp4",)
"""Forms of packed weights in which the models are published (`models.mxfp4`)."""
DEFAULTS = llama.DEFAULTS | {  # of transformers' GptOssConfig
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rope_theta": 150000.0,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Rotary positions of a config that has none."""


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a gpt-oss `config.json`."""
    number = hf.get("num_local_experts", hf.get("num_experts", DEFAULTS["num_local_experts"]))
    hf = DEFAULTS | dict(hf) | {"num_local_experts": number}
    if not (hf.get("rope_scaling") or hf.get("rope_parameters")):
        hf["rope_scaling"] = ROPE
    every_other = [layer % 2 == 0 for layer in range(hf["num_hidden_layers"])]
    window = hf["sliding_window"]
    return DecoderConfig(
        family="gpt_oss",
        **llama.sizes(hf),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        sinks=True,
        rope=llama.plain_rope(hf),
        window=window,
        windowed=() if window is None else windowed(hf, every_other),
        experts=Experts(
            number=number,
            active=hf["num_experts_per_tok"],
            width=hf["intermediate_size"],
            renormalised=True,
            balance_weight=hf["router_aux_loss_coef"],
            bias=True,
            clamped=ClampedSwiGLU(alpha=float(hf["swiglu_alpha"]), limit=float(hf["swiglu_limit"])),
        ),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    mixture = mixture_of(config)
    assert mixture.clamped is not None
    return llama.hf_sizes(config) | {
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
        "rope_scaling": rope_scaling(config.rope) or {"rope_type": "default"},
        "num_local_experts": mixture.number,
        "num_experts_per_tok": mixture.active,
        "router_aux_loss_coef": mixture.balance_weight,
        "swiglu_alpha": mixture.clamped.alpha,
        "swiglu_limit": mixture.clamped.limit,
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"
    )
    layer = "model.layers.{layer}."
    stacked = layer + "mlp.experts."
    inner = [f"layers/experts/{name}" for name in ("gate", "up")]
    mixture = [
        *linear(f"{layer}mlp.router", "layers/router", bias=True),
        interleaved(f"{stacked}gate_up_proj", tuple(f"{path}/kernel" for path in inner)),
        interleaved(f"{stacked}gate_up_proj_bias", tuple(f"{path}/bias" for path in inner)),
        same(f"{stacked}down_proj", "layers/experts/down/kernel"),
        same(f"{stacked}down_proj_bias", "layers/experts/down/bias"),
    ]
    sinks = same(f"{layer}self_attn.sinks", "layers/sinks/logits")
    attention = [*llama.attention_weights(config), sinks]
    return llama.outer_weights(config) + attention + mixture + norms
