"""Language models behind one interface of texts: local, or behind HTTP."""

from jaxalign.backends.cached import Cached
from jaxalign.backends.interface import Backend, Decoding, Generation, Prompt, Score
from jaxalign.backends.named import BackendOptions, make_backend, make_embedder

__all__ = [
    "Backend",
    "BackendOptions",
    "Cached",
    "Decoding",
    "Generation",
    "Prompt",
    "Score",
    "make_backend",
    "make_embedder",
]
