"""A tiny random model with the embedded tokenizer, as a Hugging Face folder."""

import jax

from jaxalign.data import embedded_tokenizer
from jaxalign.models import DecoderConfig, save_pretrained
from jaxalign.models.decoder import init_model


def save_tiny_model(folder, *, layers=2, context_length=64):
    """Write the folder; returns its tokenizer and its config."""
    tokenizer = embedded_tokenizer()
    config = DecoderConfig(
        family="llama",
        vocab_size=len(tokenizer),
        width=16,
        layers=layers,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=24,
        context_length=context_length,
        tied=True,
    )
    save_pretrained(init_model(config, jax.random.key(0)), folder, tokenizer=tokenizer)
    return tokenizer, config
