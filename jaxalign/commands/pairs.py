"""A model and the pairs of a source, for commands that look at pairs without training."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp

from jaxalign.commands.arguments import add_bad_records, add_chat, within
from jaxalign.config import AtLeastOne, Range
from jaxalign.data import (
    PairBatch,
    ReadReport,
    TokenizedPairs,
    check_ids,
    check_vocabulary,
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_pairs,
)
from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.score import ScoreModel
from jaxalign.models.weights import exported


@dataclass(frozen=True, kw_only=True)
class ModelAndPairs:
    """What was loaded."""

    model: Any
    tokenizer: Any
    records: Sequence[Any]
    pairs: TokenizedPairs
    left_out: Sequence[str]
    """What was skipped, dropped or cut, in words."""

    def batches(self, size: int) -> list[PairBatch]:
        """Every pair once, in order; the last batch is filled up with pairs of weight 0."""
        size = min(size, len(self.pairs))
        return list(pair_batches(self.pairs, batch_size=size, epochs=1, shuffle=False, buckets=2))

    def place(self, number: int) -> str:
        """File and line of a record."""
        record = self.records[number]
        return f"{record.source}:{record.line}"


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """The flags that `load` reads."""
    flags.add_argument(
        "--model", required=True, help="model: Hugging Face folder, Hub name or GGUF file"
    )
    flags.add_argument(
        "--data", required=True, help="preference pairs, as --data of jaxalign train"
    )
    flags.add_argument(
        "--tokenizer", help="tokenizer: folder or Hub name (default: the model's own)"
    )
    flags.add_argument(
        "--max-length",
        type=within(Annotated[int, Range("[2, inf)")]),
        default=256,
        help="largest number of tokens in prompt and response together",
    )
    flags.add_argument("--prompt-format", default="{prompt}", help="text around a plain prompt")
    add_chat(flags)
    add_bad_records(flags)
    flags.add_argument(
        "--batch-size", type=within(AtLeastOne), default=8, help="number of pairs in a batch"
    )


def load(given: argparse.Namespace, *, most: int | None = None) -> ModelAndPairs:
    """The model and its tokenised pairs.

    Args:
      given: the flags of `add_arguments`.
      most: records to take, from the first on; None: all.

    Raises:
      UserError: nothing usable in the source, or sequences longer than the model reads.
    """
    if "{prompt}" not in given.prompt_format:
        raise UserError(f"prompt_format: {given.prompt_format!r} does not hold {{prompt}}")
    source = exported(given.model)
    model = load_pretrained(source, dtype=jnp.float32)
    if isinstance(model, ScoreModel):
        raise UserError(f"model: {given.model} has a scalar head and makes no log-probs")
    context = getattr(model.config, "context_length", None)
    if context is not None and given.max_length > context:
        raise UserError(
            f"max_length: {given.max_length} tokens are more than the model's context of "
            f"{context}; set --max-length {context} or less"
        )
    tokenizer = load_tokenizer(given.tokenizer or source)
    check_vocabulary(tokenizer, model.config.vocab_size)
    read = ReadReport()
    records = []
    for record in preference_records(given.data, bad_records=given.bad_records, report=read):
        records.append(record)
        if most is not None and len(records) == most:
            break
    if not records:
        raise UserError(f"{given.data}: no usable record")
    pairs, report = tokenize_pairs(
        records,
        tokenizer,
        max_length=given.max_length,
        prompt_format=given.prompt_format,
        chat=given.chat,
        encoder_decoder=not isinstance(model.config, DecoderConfig),
    )
    check_ids(pairs.rows.flat, tokenizer, model.config.vocab_size)
    if not len(pairs):
        raise UserError(f"{given.data}: no pair whose responses differ in their tokens")
    return ModelAndPairs(
        model=model,
        tokenizer=tokenizer,
        records=records,
        pairs=pairs,
        left_out=[read.summary(), report.summary()],
    )
