"""Pretraining: next-token prediction on packed text."""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.config import TrainConfig
from jaxalign.data import TokenizedTexts, tokenize_texts
from jaxalign.data.record_index import IndexedRecords, joined
from jaxalign.data.sources import TEXTS
from jaxalign.data.token_store import texts_as_tokens
from jaxalign.errors import UserError
from jaxalign.models.config import ModelConfig
from jaxalign.sharding.processes import in_turn
from jaxalign.stages import parts
from jaxalign.stages.inputs import Inputs, TokenizedData
from jaxalign.stages.kind import Kind, Outcome, RunContext
from jaxalign.stages.records import read
from jaxalign.stages.streaming import streams, tokens_on_disk
from jaxalign.stages.structs import text_batch
from jaxalign.training.objectives import SupervisedObjective
from jaxalign.training.stage import Feed, Params, Rows, Stage

NAME, NUMBER = "pretrain", 1


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that trains all parameters on text."""
    settings = config.pretrain
    policy = parts.make_policy(config, model_config, None)
    objective = SupervisedObjective(policy=policy)
    rows, length = settings.batch_size, config.max_length
    passes = [Rows(rows=rows, length=length, scored=length, forward=1, backward=1)]
    return Stage(
        name=NAME,
        method="next tokens of text",
        rows=f"rows of {length:,} tokens",
        **parts.plain_stage(settings, objective),
        trained=parts.trained_parameters(None, parts.key_of(config, NUMBER)),
        frozen=parts.no_reference(None),
        largest_batch=lambda platform, response: (text_batch(rows, length), passes),
    )


def load(config: TrainConfig, inputs: Inputs) -> TokenizedData:
    """Documents for next-token prediction.

    Raises:
      UserError: there is no text, or the model is an encoder-decoder.
    """
    inputs.check_length()
    if inputs.is_encoder_decoder:
        raise UserError(
            f"pretrain.steps: packed text is for decoders, and {config.model} is an "
            "encoder-decoder; set --pretrain.steps 0"
        )
    if not config.pretrain.text:
        raise UserError("text: the pretraining stage needs text files; set --text FILE [FILE ...]")

    train = _tokens(config.pretrain.text, "text", config, inputs, inputs.folder / "tokens")
    held_out = None
    if config.pretrain.eval_text:
        held_out = _tokens(config.pretrain.eval_text, "eval_text", config, inputs, None)
    inputs.report[NAME] = {"tokens": len(train.flat), "characters": train.characters}
    return TokenizedData(
        train=train,
        held_out=held_out,
        sources=(),
        length=config.max_length,
        shard=inputs.shard,
    )


def _tokens(
    sources: Sequence[str], name: str, config: TrainConfig, inputs: Inputs, cache: Path | None
) -> TokenizedTexts:
    """Documents as tokens, on disk if they are streamed."""
    on_disk = streams(config, sources)
    documents = [
        read(TEXTS, source, config, inputs.report, f"{name} {source}", on_disk=on_disk)
        for source in sources
    ]
    if on_disk:
        indexed = joined([one for one in documents if isinstance(one, IndexedRecords)])
        return tokens_on_disk(texts_as_tokens, indexed, inputs.tokenizer, config, name)[0]
    texts = [record.text for one in documents for record in one]
    if cache is None:
        return tokenize_texts(texts, inputs.tokenizer)
    with in_turn("tokens"):
        return tokenize_texts(texts, inputs.tokenizer, cache=cache)


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Rows of text on the mesh."""
    del frozen
    return parts.feed(context, stage, params)


def finish(context: RunContext, params: Params, kept: Params) -> Outcome:
    """The trained parameters."""
    del context, params
    return kept, None


KIND = Kind(
    name=NAME,
    adapters=lambda config: None,
    build=build,
    load=load,
    feed=feed,
    finish=finish,
)
