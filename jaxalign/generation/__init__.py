"""Sampling from policies and from geometric mixtures of them."""

from jaxalign.generation.generate import compile_generate, generate
from jaxalign.generation.rows import Samples
from jaxalign.generation.sampling import Sampling, distribution, draw, mixture
from jaxalign.generation.stopping import ResponseText, stop_table, token_bytes

__all__ = [
    "ResponseText",
    "Samples",
    "Sampling",
    "compile_generate",
    "distribution",
    "draw",
    "generate",
    "mixture",
    "stop_table",
    "token_bytes",
]
