"""Decoders and encoder-decoders that load, run and save Hugging Face folders.

Functions take parameters as nested dicts of arrays; the nnx modules hold them for users.
"""

from jaxalign.models.config import DecoderConfig, EncoderDecoderConfig, Rope, tempered
from jaxalign.models.decoder import Decoder, init_model
from jaxalign.models.encoder_decoder import EncoderDecoder
from jaxalign.models.gguf_saving import save_gguf
from jaxalign.models.saving import save_pretrained
from jaxalign.models.weights import load_pretrained

__all__ = [
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Rope",
    "init_model",
    "load_pretrained",
    "save_gguf",
    "save_pretrained",
    "tempered",
]
