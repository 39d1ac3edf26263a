"""GPT-NeoX (Pythia): parallel branches, layer norms, partly rotated heads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families.mapping import (
    HF_ACTIVATIONS,
    Weight,
    activation,
    given,
    head_width,
    linear,
    rope,
    rope_scaling,
    same,
    transposed,
)

ARCHITECTURE = "GPTNeoXForCausalLM"
ALIASES = {"embed_out.weight": "lm_head.weight"}  # what transformers 5 calls it inside
DEFAULTS = {  # of transformers' GPTNeoXConfig
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a GPT-NeoX `config.json`."""
    hf = DEFAULTS | dict(hf)
    heads = hf["num_attention_heads"]
    parameters = given(hf, "rope_scaling", hf.get("rope_parameters"))
    theta = float(given(hf, "rotary_emb_base", given(hf, "rope_theta", 10_000.0)))
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_width=head_width(hf, width="hidden_size", heads="num_attention_heads"),
        mlp_width=hf["intermediate_size"],
        context_length=hf["max_position_embeddings"],
        norm="layer",
        norm_eps=hf["layer_norm_eps"],
        norm_placement="parallel" if hf["use_parallel_residual"] else "pre",
        activation=activation(hf, "hidden_act"),
        gated=False,
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        mlp_bias=True,
        rope=rope(hf, parameters, theta=theta, rotated=float(given(hf, "rotary_pct", 0.25))),
        tied=bool(hf["tie_word_embeddings"]),
        initializer_range=hf["initializer_range"],
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.context_length,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "use_parallel_residual": config.norm_placement == "parallel",
        "attention_bias": config.qkv_bias,
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": config.rope.rotated,
        "rope_scaling": rope_scaling(config.rope),
    }


def fused_heads(name: str, leaf: str, config: DecoderConfig) -> Weight:
    """Queries, keys and values of one head after another: [heads, 3, head_width] outputs."""
    paths = tuple(f"layers/{part}/{leaf}" for part in "qkv")
    outputs = config.heads * config.head_width

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = x.reshape(config.heads, 3, config.head_width, *x.shape[1:])
        return tuple(parts[:, i].reshape(outputs, *x.shape[1:]).T for i in range(3))

    def join(*parts: np.ndarray) -> np.ndarray:
        rows = [p.T.reshape(config.heads, config.head_width, *p.shape[:-1]) for p in parts]
        return np.stack(rows, axis=1).reshape(3 * outputs, *parts[0].shape[:-1])

    return Weight(name=name, paths=paths, split=split, join=join)


def norm(name: str, path: str) -> list[Weight]:
    """A layer norm's scale and bias."""
    return [same(f"{name}.weight", f"{path}/scale"), same(f"{name}.bias", f"{path}/bias")]


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    layer = "gpt_neox.layers.{layer}."
    table = [
        same("gpt_neox.embed_in.weight", "embed/embedding"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *norm(f"{layer}input_layernorm", "layers/attention_norm"),
        *norm(f"{layer}post_attention_layernorm", "layers/mlp_norm"),
        fused_heads(f"{layer}attention.query_key_value.weight", "kernel", config),
        *linear(f"{layer}attention.dense", "layers/o", bias=config.output_bias),
        *linear(f"{layer}mlp.dense_h_to_4h", "layers/up", bias=True),
        *linear(f"{layer}mlp.dense_4h_to_h", "layers/down", bias=True),
    ]
    if config.qkv_bias:
        table.append(fused_heads(f"{layer}attention.query_key_value.bias", "bias", config))
    if not config.tied:
        table.append(transposed("embed_out.weight", "unembed/kernel"))
    return table
