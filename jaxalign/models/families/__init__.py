"""How Hugging Face configs and weight names map onto the shared models: one file per family."""

from types import ModuleType

from jaxalign.models.families import llama

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
}
