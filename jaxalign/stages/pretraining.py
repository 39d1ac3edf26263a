"""Pretraining: next-token prediction on packed text."""

from collections.abc import Sequence

from jaxalign.config import TrainConfig
from jaxalign.data import text_records, tokenize_texts
from jaxalign.errors import UserError
from jaxalign.models.config import ModelConfig
from jaxalign.sharding.processes import in_turn
from jaxalign.stages import parts
from jaxalign.stages.inputs import Inputs, TokenizedData, read
from jaxalign.stages.kind import Kind, Outcome, RunContext
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

    def texts(sources: Sequence[str], name: str) -> list[str]:
        return [
            record.text
            for source in sources
            for record in read(text_records, source, config, inputs.report, f"{name} {source}")
        ]

    documents = texts(config.pretrain.text, "text")
    with in_turn("tokens"):
        train = tokenize_texts(documents, inputs.tokenizer, cache=inputs.folder / "tokens")
    held_out = None
    if config.pretrain.eval_text:
        held_out = tokenize_texts(texts(config.pretrain.eval_text, "eval_text"), inputs.tokenizer)
    inputs.report[NAME] = {"tokens": len(train.flat), "characters": train.characters}
    return TokenizedData(
        train=train,
        held_out=held_out,
        sources=(),
        length=config.max_length,
        shard=inputs.shard,
    )


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
