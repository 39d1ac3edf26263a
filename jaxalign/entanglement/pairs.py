"""A model and preference pairs for measurements without training."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxalign.data import (
    PairBatch,
    PreferenceRecord,
    ReadReport,
    TokenizedPairs,
    check_ids,
    check_vocabulary,
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_pairs,
)
from jaxalign.data.plain_prompts import Chat
from jaxalign.data.reading import BadRecords
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.folders import exported
from jaxalign.models.score import ScoreModel


@dataclass(frozen=True, kw_only=True)
class ModelAndPairs:
    """A model and tokenised preference pairs."""

    model: Any
    tokenizer: Tokenizer
    records: Sequence[Any]
    pairs: TokenizedPairs
    batch_size: int
    left_out: Sequence[str]
    """Lines with the numbers of skipped, dropped and truncated records."""

    def batches(self, size: int | None = None) -> list[PairBatch]:
        """Every pair once, in order; pairs of weight 0 fill the last batch."""
        size = min(size or self.batch_size, len(self.pairs))
        return list(pair_batches(self.pairs, batch_size=size, epochs=1, shuffle=False, buckets=2))

    def source(self, number: int) -> str:
        """File and line of a record."""
        record = self.records[number]
        return f"{record.source}:{record.line}"


def load_pairs(
    model: str,
    data: str,
    *,
    tokenizer: str | None = None,
    max_length: int = 256,
    prompt_format: str = "{prompt}",
    chat: Chat = "auto",
    bad_records: BadRecords = "error",
    batch_size: int = 8,
    limit: int | None = None,
) -> ModelAndPairs:
    """Load a model, and read and tokenise preference pairs.

    Args:
      model: Hugging Face folder, Hub name, run folder or GGUF file.
      data: source of the pairs, as for `preference_records`.
      tokenizer: folder or Hub name; None: the model's own.
      max_length: largest number of tokens in prompt and response together.
      prompt_format: text around a plain prompt.
      chat: whether plain prompts go through the chat template.
      bad_records: response to a record that cannot be used.
      batch_size: number of pairs in a batch.
      limit: largest number of records, counted from the first; None: all.

    Raises:
      UserError: the source has no usable pair, or the model cannot read sequences this long.
    """
    if "{prompt}" not in prompt_format:
        raise UserError(f"prompt_format: {prompt_format!r} must contain {{prompt}}")
    folder = exported(model)
    loaded = load_pretrained(folder, dtype=jnp.float32)
    if isinstance(loaded, ScoreModel):
        raise UserError(f"model: {model} has a scalar head and no log-probs")
    context = getattr(loaded.config, "context_length", None)
    if context is not None and max_length > context:
        raise UserError(
            f"max_length: {max_length} tokens are more than the model's context of {context}; set "
            f"--max-length {context} or less"
        )
    reader = load_tokenizer(tokenizer or folder)
    check_vocabulary(reader, loaded.config.vocab_size)
    read = ReadReport()
    usable = preference_records(data, bad_records=bad_records, report=read)
    records = list(itertools.islice(usable, limit))
    if not records:
        raise UserError(f"{data}: no usable record")
    pairs = with_pairs(
        loaded,
        reader,
        records,
        max_length=max_length,
        prompt_format=prompt_format,
        chat=chat,
        batch_size=batch_size,
        bad_records=bad_records,
    )
    if not len(pairs.pairs):
        raise UserError(f"{data}: no pair whose responses differ in their tokens")
    return dataclasses.replace(pairs, left_out=[read.summary(), *pairs.left_out])


def with_pairs(
    model: Any,
    tokenizer: Tokenizer,
    records: Sequence[PreferenceRecord],
    *,
    max_length: int,
    prompt_format: str = "{prompt}",
    chat: Chat = "auto",
    batch_size: int = 8,
    bad_records: BadRecords = "error",
) -> ModelAndPairs:
    """Tokenise preference pairs for a model; the arguments are those of `load_pairs`."""
    pairs, report = tokenize_pairs(
        records,
        tokenizer,
        max_length=max_length,
        prompt_format=prompt_format,
        chat=chat,
        bad_records=bad_records,
        encoder_decoder=not isinstance(model.config, DecoderConfig),
    )
    check_ids(pairs.rows.flat, tokenizer, model.config.vocab_size)
    return ModelAndPairs(
        model=model,
        tokenizer=tokenizer,
        records=records,
        pairs=pairs,
        batch_size=batch_size,
        left_out=[report.summary()],
    )


def load_reference(name: str | None, loaded: ModelAndPairs) -> Any:
    """The reference model; without a name, the policy itself.

    Raises:
      UserError: its vocabulary is not the policy's.
    """
    if name is None:
        return loaded.model
    reference = load_pretrained(exported(name), dtype=jnp.float32)
    if reference.config.vocab_size != loaded.model.config.vocab_size:
        raise UserError(f"reference: {name} has another vocabulary than the model")
    return reference
