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
    granite,
    granitemoehybrid,
    llama,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
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
    "granite": granite,
    "granitemoehybrid": granitemoehybrid,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
    "t5": t5,
}
