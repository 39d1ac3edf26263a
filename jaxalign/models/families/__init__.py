"""How Hugging Face configs and weight names map onto the shared models: one file per family."""

from types import ModuleType

from jaxalign.models.families import (
    cohere2,
    gemma,
    gemma2,
    gemma3_text,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoehybrid,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    t5,
)

FAMILIES: dict[str, ModuleType] = {
    "cohere2": cohere2,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "glm": glm,
    "glm4": glm4,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "granitemoehybrid": granitemoehybrid,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "t5": t5,
}

LATENT = "keys and values that are stored compressed (latent attention) have no layer here"
LINEAR = "gated linear-attention layers have no layer here"
REFUSED = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"), LATENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_next"), LINEAR),
    **dict.fromkeys(("llama4", "llama4_text"), "attention in chunks has no layer here"),
    **dict.fromkeys(
        ("gemma4", "gemma4_text"), "heads that are wider in some layers do not fit stacked layers"
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"), "layers with inputs of their own and shared keys do not fit"
    ),
}
"""Families that are not supported -> the reason, which the message gives."""
