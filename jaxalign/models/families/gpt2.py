"""GPT-2: learned positions, layer norms, matrices stored [inputs, outputs]."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families.gpt_neox import norm
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    fused,
    given,
    head_width,
    refuse,
    same,
    transposed,
)

ARCHITECTURE = "GPT2LMHeadModel"
SCORE_ARCHITECTURE = "GPT2ForSequenceClassification"
DEFAULTS = {  # of transformers' GPT2Config
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a GPT-2 `config.json`."""
    refuse(hf, "scale_attn_by_inverse_layer_idx", unless=False)
    refuse(hf, "add_cross_attention", unless=False)
    hf = DEFAULTS | dict(hf)
    width, heads = hf["n_embd"], hf["n_head"]
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        width=width,
        layers=hf["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_width=head_width(hf, width="n_embd", heads="n_head"),
        mlp_width=given(hf, "n_inner", 4 * width),
        context_length=hf["n_positions"],
        norm="layer",
        norm_eps=hf["layer_norm_epsilon"],
        activation=activation(hf, "activation_function"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        position_kind="learned",
        query_scale=None if hf["scale_attn_weights"] else 1.0,
        tied=bool(hf["tie_word_embeddings"]),
        initializer_range=hf["initializer_range"],
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    tanh = config.activation == "gelu_tanh"
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new" if tanh else HF_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "scale_attn_weights": config.query_scale is None,
        "tie_word_embeddings": config.tied,
    }


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    layer = "transformer.h.{layer}."
    table = [
        same("transformer.wte.weight", "embed/embedding"),
        same("transformer.wpe.weight", "positions/embedding"),
        *norm("transformer.ln_f", "final_norm"),
        *norm(f"{layer}ln_1", "layers/attention_norm"),
        *norm(f"{layer}ln_2", "layers/mlp_norm"),
    ]
    for leaf, kind in (("kernel", "weight"), ("bias", "bias")):
        paths = tuple(f"layers/{name}/{leaf}" for name in "qkv")
        table += [
            fused(f"{layer}attn.c_attn.{kind}", paths, (config.width,) * 3, axis=-1),
            same(f"{layer}attn.c_proj.{kind}", f"layers/o/{leaf}"),
            same(f"{layer}mlp.c_fc.{kind}", f"layers/up/{leaf}"),
            same(f"{layer}mlp.c_proj.{kind}", f"layers/down/{leaf}"),
        ]
    if not config.tied:
        table.append(transposed("lm_head.weight", "unembed/kernel"))
    return table
