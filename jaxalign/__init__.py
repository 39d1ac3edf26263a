"""jaxalign: aligning language models with preferences, in JAX."""

__version__ = "0.2.0"
