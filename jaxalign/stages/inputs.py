"""The data of a run: read, split, tokenised and batched, with a report of skipped records."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config import TrainConfig
from jaxalign.data import (
    PairBatch,
    ReadReport,
    TextBatch,
    TokenizedPairs,
    TokenizedRows,
    TokenizedTexts,
    check_ids,
    embedded_tokenizer,
    load_tokenizer,
    packed_rows,
    pair_batches,
    text_batches,
    text_records,
    tokenize_pairs,
    tokenize_responses,
)
from jaxalign.data.batches import padded_positions
from jaxalign.data.mixtures import BySource, Mixture, Part
from jaxalign.data.order import WINDOW, Iterations
from jaxalign.data.packing import Packing, packed_batches, packer_of
from jaxalign.data.plain_prompts import ends_responses
from jaxalign.data.record_index import IndexedRecords
from jaxalign.data.sources import PREFERENCES, RESPONSES
from jaxalign.data.tokenized import TokenizedExamples, TokenizedResponses
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError
from jaxalign.files import replacing
from jaxalign.models import DecoderConfig
from jaxalign.models.config import ModelConfig
from jaxalign.representation import (
    Instructions,
    Tokenization,
    hindsight_rows,
    make_instructions,
    responses_of,
)
from jaxalign.sharding.processes import in_turn
from jaxalign.stages.prompts import chat_of
from jaxalign.stages.records import RunRecords, counted_mixture, run_records, say, sources_of
from jaxalign.stages.streaming import tokens_on_disk
from jaxalign.training.objectives import ReferencedBatch

INPUTS = "inputs.json"
"""File in the run folder with digests of the run's inputs."""


def load_tokenizer_for(config: TrainConfig, folder: Path) -> Any:
    """The named tokenizer, the model's, or one trained for this run; stored in the run folder."""
    with in_turn("tokenizer"):
        return _tokenizer(config, folder / "tokenizer")


def _tokenizer(config: TrainConfig, stored: Path) -> Any:
    if stored.is_dir():
        return load_tokenizer(stored)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif config.model != "embedded":
        tokenizer = load_tokenizer(config.model)
    elif config.pretrain.text:
        from jaxalign.data.bpe import train_bpe

        texts = (
            record.text
            for source in config.pretrain.text
            for record in text_records(
                source, bad_records=config.bad_records, report=ReadReport()
            )  # what is skipped is told where the texts are read to train on
        )
        tokenizer = train_bpe(texts, vocabulary=config.architecture.vocabulary)
    else:
        tokenizer = embedded_tokenizer()
    with replacing(stored) as scratch:
        tokenizer.save_pretrained(scratch)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizedData:
    """Training and held-out data of one stage."""

    train: TokenizedPairs | TokenizedRows | TokenizedTexts
    held_out: TokenizedPairs | TokenizedRows | TokenizedTexts | None
    sources: Sequence[str]
    """File and line of each training record, by its number; empty for text."""
    length: int
    """Tokens of a row of packed text."""
    joint_share: float = 0.0
    """As in `pair_batches`."""
    packing: Packing | None = None
    """Rows of a packed training batch of pairs or responses; None: these are padded."""
    mixture: Mixture | None = None
    """How often the sources' training examples are used; None: all once an epoch."""
    held_out_by_source: BySource | None = None
    """The held-out records of each source; None: there is one."""
    shard: tuple[int, int] = (0, 1)
    """Shard of each batch that this process feeds: its index and the number of shards."""

    @property
    def _shard_options(self) -> dict[str, Any]:
        return dict(zip(("process_index", "process_count"), self.shard, strict=True))

    def examples(self, seed: int) -> int:
        """Number of rows in an epoch: pairs, responses, or packed rows of text."""
        if isinstance(self.train, TokenizedTexts):
            return packed_rows(self.train, length=self.length, seed=seed)
        return len(self.train) if self.mixture is None else self.mixture.examples

    def batches(self, batch_size: int, *, seed: int) -> Any:
        """The endless, checkpointable iterator of this process's training batches."""
        return self._batches(
            self.train, self.packing, batch_size=batch_size, seed=seed, **self._mixed
        )

    @property
    def _mixed(self) -> dict[str, Any]:
        return {} if self.mixture is None else {"mixture": self.mixture}

    def once(self, data: Any, batch_size: int, **mixture: Part) -> Iterations:
        """Every example once, in the training batches' form; weight 0 fills the last batch.

        Args:
          data: examples or texts.
          batch_size: examples per batch.
          **mixture: `mixture`, a part of the examples; none: all.
        """
        packing = self.packing
        if packing is not None:
            packing = dataclasses.replace(packing, micro_batches=1, apart=False)
        fixed: dict[str, Any] = {"epochs": 1, "shuffle": False, **mixture}
        if not isinstance(data, TokenizedTexts):
            fixed["window"] = WINDOW
        return self._batches(data, packing, batch_size=batch_size, **fixed)

    def _batches(self, data: Any, packing: Packing | None, **order: Any) -> Any:
        options = order | self._shard_options
        if isinstance(data, TokenizedTexts):
            return text_batches(data, length=self.length, **options)
        if packing is not None:
            return packed_batches(as_examples(data), packing, **options)
        return pair_batches(as_examples(data), joint_share=self.joint_share, **options)

    def positions(self, packing: Packing | None, *, apart: bool = False, **order: Any) -> float:
        """Mean number of positions that the network computes for a training batch.

        Args:
          packing: number of packed rows; None: padded.
          apart: whether each response has a prompt of its own, as in probed steps.
          **order: batch_size and seed.
        """
        assert not isinstance(self.train, TokenizedTexts)
        examples, order = as_examples(self.train), order | self._mixed
        if packing is None:
            share = 0.0 if apart else self.joint_share
            return padded_positions(examples, joint_share=share, **order)
        packer = packer_of(examples, packing, **order)
        room = packer.room if not apart else packer.room_apart
        assert room is not None  # the rows share a batch equally
        return packing.rows * float(np.atleast_1d(room)[0])

    def evaluation(self, batch_size: int) -> list[Any]:
        """The held-out batches, each of one source; empty if nothing is held out."""
        if self.held_out is None:
            return []
        if self.held_out_by_source is None or isinstance(self.held_out, TokenizedTexts):
            return list(self.once(self.held_out, batch_size))
        numbers = self.held_out.record_index
        parts = [Part(members=x) for x in self.held_out_by_source.members(numbers) if len(x)]
        batches = (self.once(self.held_out, batch_size, mixture=part) for part in parts)
        return list(itertools.chain.from_iterable(batches))

    def first_held_out(self, batch_size: int) -> PairBatch | None:
        """The first held-out pairs, padded; None if nothing is held out.

        Held-out batches are of pairs of similar lengths; these pairs are not chosen by length.
        """
        if self.held_out is None or not len(self.held_out):
            return None
        assert isinstance(self.held_out, TokenizedPairs)
        order = self._shard_options | {"epochs": 1, "shuffle": False, "batch_size": batch_size}
        return next(pair_batches(self.held_out, joint_share=self.joint_share, **order))

    def describe(self, batch: PairBatch | TextBatch) -> list[str]:
        """File and line of a batch's records; of text, each row's first document."""
        numbers = np.asarray(batch.record_index)[np.asarray(batch.weight) > 0]
        if not self.sources:
            return [f"document {number + 1}" for number in numbers]
        return [self.sources[int(number)] for number in numbers]


def as_examples(data: TokenizedPairs | TokenizedRows) -> TokenizedExamples:
    """Pairs as they are; prompts with a response each as examples of one side."""
    return TokenizedResponses(rows=data) if isinstance(data, TokenizedRows) else data


def joint_share(share_prompts: str, model_config: ModelConfig) -> float:
    """Largest size of a row with a shared prefix, as a fraction of two rows; 0: never share."""
    if share_prompts == "never" or not isinstance(model_config, DecoderConfig):
        return 0.0
    return 1.0 if share_prompts == "always" else 0.75


@jax.jit
def count_computed(batch: PairBatch | TextBatch | ReferencedBatch) -> jax.Array:
    """Tokens that the network computes, without padding and with shared prefixes counted once."""
    tokens, pairs = count_tokens(batch), getattr(batch, "pairs", batch)
    if isinstance(pairs, PairBatch) and pairs.packed is not None:
        return jnp.sum(pairs.packed.segment_ids > 0)
    if isinstance(pairs, PairBatch) and pairs.common_length is not None:
        return tokens - jnp.sum(pairs.common_length)
    return tokens


@jax.jit
def count_tokens(batch: PairBatch | TextBatch | ReferencedBatch) -> jax.Array:
    """Tokens of a batch without padding."""
    if isinstance(batch, ReferencedBatch):
        batch = batch.pairs
    if isinstance(batch, PairBatch):
        return jnp.sum(batch.prompt_length + batch.response_length)
    return jnp.sum(batch.segment_ids > 0)


class Inputs:
    """Reader of the data of a run's stages; pairs are read once for all stages.

    Args:
      config: of the run.
      tokenizer: of the run.
      folder: of the run, for caches.
      model_config: the architecture.
      shard: of each batch that this process feeds: its index and the number of shards.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        folder: Path,
        model_config: ModelConfig,
        shard: tuple[int, int],
    ):
        self.config, self.tokenizer, self.folder = config, tokenizer, folder
        self.model_config, self.shard = model_config, shard
        self.report: dict[str, Any] = {}
        """Counts of records read and skipped, for `data.json`."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return not isinstance(self.model_config, DecoderConfig)

    @functools.cached_property
    def pairs(self) -> "PreferenceData":
        """The pairs of the run.

        Raises:
          UserError: a record cannot be used, or there is none to train on.
        """
        return PreferenceData(self)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Options of the tokenisation of prompts and responses."""
        if self.config.end_token and not ends_responses(self.tokenizer):
            say(
                f"{self.config.tokenizer or self.config.model}: its model was trained without an "
                "end-of-sequence token after responses; --no-end-token leaves it out here, too"
            )
        return {
            "bad_records": self.config.bad_records,
            "max_length": self.config.max_length,
            "prompt_format": self.config.prompt_format,
            "chat": chat_of(self.config),
            "end_token": self.config.end_token,
            "encoder_decoder": self.is_encoder_decoder,
        }

    def tokenized(self, tokenize: Any, records: Iterable[Any], name: str, **more: Any) -> Any:
        """Rows of records, counted in the report under a name; `more` overrides options."""
        options = self.options | more
        if isinstance(records, IndexedRecords):
            tokens, report = tokens_on_disk(
                tokenize, records, self.tokenizer, self.config, name, **options
            )
        else:
            tokens, report = tokenize(records, self.tokenizer, **options)
        self.report[name] = dataclasses.asdict(report)
        say(f"{name.replace('_', ' ')}: {report.summary()}")
        return tokens

    def check_length(self) -> None:
        """Raise `UserError` if rows may be longer than the model's context."""
        context = getattr(self.model_config, "context_length", None)
        if context is not None and self.config.max_length > context:
            raise UserError(
                f"max_length: {self.config.max_length} tokens are more than the model's context of "
                f"{context}; set --max-length {context} or less"
            )


def check_tokens(data: Any, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Check that all tokens of a stage's data are rows of the model's embedding.

    Raises:
      UserError: one is not.
    """
    if isinstance(data, TokenizedRows) and data.largest is not None:
        check_ids([data.largest], tokenizer, vocabulary)
    elif isinstance(data, TokenizedRows | TokenizedTexts):
        check_ids(data.flat, tokenizer, vocabulary)
    elif isinstance(data, list | tuple):
        for part in data:
            check_tokens(part, tokenizer, vocabulary)
    elif dataclasses.is_dataclass(data):
        for field in dataclasses.fields(data):
            check_tokens(getattr(data, field.name), tokenizer, vocabulary)


def tokenization(config: TrainConfig, tokenizer: Tokenizer) -> Tokenization:
    """Tokenization of stimuli: the same as of all other rows."""
    return Tokenization(
        tokenizer=tokenizer,
        max_length=config.max_length,
        prompt_format=config.prompt_format,
        chat=chat_of(config),
        end_token=config.end_token,
        bad_records=config.bad_records,
    )


def instructions_of(config: TrainConfig) -> Instructions:
    """The two instructions of a config."""
    alignment = config.representation.alignment
    return make_instructions(alignment.instructions, alignment.positive, alignment.negative)


class PreferenceData:
    """The pairs of a run, read once for all stages that train on pairs."""

    def __init__(self, inputs: Inputs):
        self._config, self._tokenizer = inputs.config, inputs.tokenizer
        self._report, self._is_encoder_decoder = inputs.report, inputs.is_encoder_decoder
        self.tokenized = inputs.tokenized

    @functools.cached_property
    def _records(self) -> RunRecords:
        config, names = self._config, ("data", "eval_data")
        return run_records(PREFERENCES, config.data, config.eval_data, config, self._report, names)

    @property
    def train(self) -> Sequence[Any]:
        """The pairs to train on."""
        return self._records.train

    @property
    def held_out(self) -> Sequence[Any]:
        """The held-out pairs."""
        return self._records.held_out

    def instructed(self, tokenize: Any, records: Sequence[Any], name: str) -> Any:
        """Responses under the two instructions; those that are too long are skipped and counted."""
        if self._is_encoder_decoder:
            raise UserError(
                f"model: {self._config.model} is an encoder-decoder; responses under instructions "
                "need a decoder"
            )
        how = tokenization(self._config, self._tokenizer)
        tokens, report = tokenize(records, how, instructions_of(self._config))
        self._report[name] = dataclasses.asdict(report)
        say(f"{name.replace('_', ' ')}: {report.summary()}")
        return tokens

    def preferences(
        self, tokenize: Callable[[Sequence[Any], str], TokenizedPairs] | None = None
    ) -> TokenizedData:
        """Pairs for a preference loss.

        Args:
          tokenize: (records, name in the report) -> pairs; None: prompts with two responses.
        """

        def plain(records: Sequence[Any], name: str) -> TokenizedPairs:
            return self.tokenized(tokenize_pairs, records, name)

        rows = tokenize or plain
        train = rows(self.train, "train_pairs")
        return TokenizedData(
            train=train,
            held_out=rows(self.held_out, "held_out_pairs") if self.held_out else None,
            sources=sources_of(self.train),
            length=self._config.max_length,
            mixture=counted_mixture(self._records, train.record_index, self._report, "pairs"),
            held_out_by_source=self._records.by_source(),
        )

    def responses(self) -> TokenizedData:
        """Prompts and responses for SFT: from `sft_data`, or responses of the pairs."""
        config = self._config
        if config.sft.data:
            names = ("sft_data", "sft_data")
            records = run_records(RESPONSES, config.sft.data, (), config, self._report, names)
        else:
            records = self._records
        train, held_out = records.train, records.held_out
        if not config.sft.data and config.sft.responses != "hindsight":
            sides = ((one, config.sft.responses) for one in (train, held_out))
            train, held_out = itertools.starmap(responses_of, sides)

        def rows(records: Sequence[Any], name: str) -> Any:
            if config.sft.responses == "hindsight":
                return self.instructed(hindsight_rows, records, name)
            return self.tokenized(tokenize_responses, records, name, turns=config.sft.turns)

        tokens = rows(train, "train_responses")
        return TokenizedData(
            train=tokens,
            held_out=rows(held_out, "held_out_responses") if held_out else None,
            sources=sources_of(train),
            length=config.max_length,
            mixture=counted_mixture(records, tokens.record_index, self._report, "responses"),
            held_out_by_source=records.by_source(),
        )
