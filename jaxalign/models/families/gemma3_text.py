"""Gemma 3 (text): Gemma 2 with normed queries and keys and a base of its own for local layers."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import gemma2, llama
from jaxalign.models.families.mapping import (
    Weight,
    given,
    hf_ropes_of_kinds,
    rope_scaling,
    ropes_of_kinds,
    windowed,
)

ARCHITECTURE = "Gemma3ForCausalLM"
SCORE_ARCHITECTURE = "Gemma3TextForSequenceClassification"
DEFAULTS = gemma2.DEFAULTS | {  # of transformers' Gemma3TextConfig
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


def config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our description of a Gemma 3 text `config.json`, old form or new."""
    hf = DEFAULTS | dict(hf)
    theta = float(given(hf, "rope_theta", GLOBAL_THETA))
    local_theta = float(given(hf, "rope_local_base_freq", LOCAL_THETA))
    full, local = ropes_of_kinds(hf, theta=theta, local_theta=local_theta)
    every = given(hf, "sliding_window_pattern", given(hf, "_sliding_window_pattern", 6))
    pattern = [(layer + 1) % every != 0 for layer in range(hf["num_hidden_layers"])]
    return DecoderConfig(
        family="gemma3_text",
        **gemma2.shared(hf),
        qk_norm="head",
        rope=full,
        local_rope=local,
        windowed=windowed(hf, pattern),
    )


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads back as this model."""
    local = config.local_rope or config.rope
    fields = gemma2.hf_shared(config)
    if rope_scaling(local) is None:
        return fields | {"rope_local_base_freq": local.theta}
    # Scaled local layers exist in the new form alone.
    del fields["rope_theta"], fields["rope_scaling"]
    return fields | hf_ropes_of_kinds(config)


def weights(config: DecoderConfig) -> list[Weight]:
    """The table of Hugging Face tensors and our leaves."""
    norms = llama.norm_weights(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    return gemma2.weights(config) + norms
