"""Qwen3 with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig, Experts
from jaxalign.models.families import llama, qwen2
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    given,
    refuse,
    transposed,
)

ARCHITECTURE = "Qwen3MoeForCausalLM"
ROUTER = "mlp.gate.weight"
EXPERT = "mlp.experts.{expert}.{matrix}.weight"
MATRICES = {name: f"{name}_proj" for name in ("gate", "up", "down")}
DEFAULTS = qwen2.DEFAULTS | {  # of transformers' Qwen3MoeConfig
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}


def experts(hf: Mapping[str, Any], *, number: str, width: str) -> Experts:
    """The mixture of a config that says whether weights are renormalised in `norm_topk_prob`.

    Args:
      hf: the config.
      number: field of the number of experts.
      width: field of their inner width.
    """
    return Experts(
        number=hf[number],
        active=hf["num_experts_per_tok"],
        width=hf[width],
        renormalised=hf["norm_topk_prob"],
        balance_weight=hf["router_aux_loss_coef"],
    )


def hf_experts(config: DecoderConfig, *, number: str, width: str) -> dict[str, Any]:
    """The reverse of `experts`."""
    mixture = mixture_of(config)
    return {
        number: mixture.number,
        "num_experts_per_tok": mixture.active,
        width: mixture.width,
        "norm_topk_prob": mixture.renormalised,
        "router_aux_loss_coef": mixture.balance_weight,
    }


def mixture_of(config: DecoderConfig) -> Experts:
    """The config's experts, which it must have."""
    if config.experts is None:
        raise UserError(f"{config.family}: a config without experts")
    return config.experts


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Qwen3-MoE `config.json`."""
    refuse(hf, "decoder_sparse_step", unless=1)
    if given(hf, "mlp_only_layers", []):
        raise UserError(
            f"config.json: mlp_only_layers: {hf['mlp_only_layers']} is not supported, only experts "
            "in every layer are"
        )
    hf = {name: value for name, value in hf.items() if name != "num_local_experts"} | {
        "num_experts": hf.get("num_experts", hf.get("num_local_experts", DEFAULTS["num_experts"]))
    }
    hf = DEFAULTS | dict(hf)
    return DecoderConfig(
        family="qwen3_moe",
        **llama.sizes(hf),
        **qwen2.windows(hf),
        activation=activation(hf, "hidden_act"),
        qkv_bias=bool(hf["attention_bias"]),
        output_bias=bool(hf["attention_bias"]),
        qk_norm="head",
        rope=llama.plain_rope(hf),
        experts=experts(hf, number="num_experts", width="moe_intermediate_size"),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    sizes = hf_experts(config, number="num_experts", width="moe_intermediate_size")
    return qwen2.hf_config(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **sizes,
    }


def expert_weights(router: str, expert: str, matrices: Mapping[str, str]) -> list[Weight]:
    """The router and the experts' matrices, a tensor for each expert.

    Args:
      router: name of the router's tensor in a layer.
      expert: name of a matrix, of its "{expert}" and "{matrix}".
      matrices: our name of a matrix -> theirs.
    """
    prefix = "model.layers.{layer}."
    table = [transposed(prefix + router, "layers/router/kernel")]
    for ours, theirs in matrices.items():
        name = expert.replace("{matrix}", theirs)
        table.append(transposed(prefix + name, f"layers/experts/{ours}/kernel"))
    return table


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    )
    mixture = expert_weights(ROUTER, EXPERT, MATRICES)
    return llama.outer_weights(config) + llama.attention_weights(config) + mixture + norms
