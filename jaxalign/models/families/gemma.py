"""Gemma 1: Llama with scaled embeddings, norms around 1 and a tanh-GELU."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import llama
from jaxalign.models.families.mapping import HF_ACTIVATIONS, activation, given, refuse

ARCHITECTURE = "GemmaForCausalLM"
DEFAULTS = llama.DEFAULTS | {  # of transformers' GemmaConfig
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Gemma `config.json`."""
    if hf.get("use_bidirectional_attention") is not None:
        refuse(hf, "use_bidirectional_attention", unless=False)
    hf = DEFAULTS | dict(hf)
    name = given(hf, "hidden_activation", hf["hidden_act"])
    # The first releases said "gelu" and meant its approximation.
    hf["hidden_act"] = "gelu_pytorch_tanh" if name == "gelu" else name
    return DecoderConfig(
        family="gemma",
        **llama.sizes(hf),
        norm_offset=1.0,
        activation=activation(hf, "hidden_act"),
        qkv_bias=hf["attention_bias"],
        output_bias=hf["attention_bias"],
        rope=llama.plain_rope(hf),
        embedding_scale=hf["hidden_size"] ** 0.5,
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    return llama.hf_sizes(config) | {
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "hidden_activation": HF_ACTIVATIONS[config.activation],
        "attention_bias": config.qkv_bias,
    }


weights = llama.weights
