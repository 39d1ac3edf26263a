"""How Hugging Face configs and weight names map onto the shared models: one file per family."""

from types import ModuleType

from jaxalign.models.families import (
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    t5,
)

FAMILIES: dict[str, ModuleType] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmoe": olmoe,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "t5": t5,
}
