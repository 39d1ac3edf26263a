"""A byte-level BPE tokenizer of our own, trained on text and saved as a Hugging Face folder."""

import os
from collections.abc import Iterable
from typing import Any

from jaxalign.errors import UserError

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL = (PAD, BEGIN, END)
BYTES = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def train_bpe(
    texts: Iterable[str], *, vocabulary: int = 4096, chat_template: str | None = CHAT_TEMPLATE
) -> Any:
    """A byte-level BPE tokenizer; every text survives encoding and decoding unchanged.

    Args:
      texts: what to learn merges from.
      vocabulary: tokens in all: 3 special ones (padding, beginning, end), 256 bytes, merges.
      chat_template: how conversations become text; None: the tokenizer has no template.

    Returns:
      A tokenizer of transformers that begins a text with <|begin|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocabulary < len(SPECIAL) + BYTES:
        raise UserError(
            f"vocabulary: {vocabulary} does not hold {len(SPECIAL)} special tokens "
            f"and {BYTES} bytes; use {len(SPECIAL) + BYTES} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = (  # pyright: ignore[reportAttributeAccessIssue]
        processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
        )
    )
    return as_tokenizer(tokenizer.to_str(), chat_template=chat_template)


def as_tokenizer(description: str, *, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A tokenizer of transformers from a trained backend's JSON."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(description),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
