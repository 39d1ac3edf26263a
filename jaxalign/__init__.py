"""jaxalign: aligning language models with preferences, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxalign.api import LanguageModel, load, preference_step, train
    from jaxalign.config import TrainConfig

__version__ = "0.2.0"
__all__ = ["LanguageModel", "TrainConfig", "load", "preference_step", "train"]


def __getattr__(name: str) -> Any:
    """The names of `jaxalign.api`, imported when they are used: JAX takes a second to start."""
    if name == "TrainConfig":
        from jaxalign.config import TrainConfig

        return TrainConfig
    if name in __all__:
        from jaxalign import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")
