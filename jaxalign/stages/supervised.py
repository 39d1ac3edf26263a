"""Supervised fine-tuning (SFT): next-token prediction on responses."""

import dataclasses
from typing import Any

from jaxalign.config import TrainConfig
from jaxalign.models.config import ModelConfig
from jaxalign.stages import parts
from jaxalign.stages.inputs import Inputs, TokenizedData
from jaxalign.stages.kind import Kind, RunContext
from jaxalign.stages.packing import check_batches_known, with_packing
from jaxalign.stages.structs import pair_batch
from jaxalign.training.objectives import SupervisedObjective
from jaxalign.training.stage import Feed, Params, Rows, Stage

NAME, NUMBER = "sft", 2


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that trains parameters or adapters on responses."""
    settings, adapters = config.sft, parts.run_adapters(config)
    policy = parts.make_policy(config, model_config, adapters)
    objective = SupervisedObjective(policy=policy)
    rows, length = settings.batch_size, config.max_length

    def largest_batch(platform: str, response: int | None) -> tuple[Any, list[Rows]]:
        del platform
        scored = response or length
        passes = Rows(rows=rows, length=length, scored=scored, forward=1, backward=1)
        return pair_batch(rows, 1, length, scored), [passes]

    return Stage(
        name=NAME,
        method="next tokens of responses",
        rows=f"responses of {length:,} tokens",
        **parts.plain_stage(settings, objective),
        trained=parts.trained_parameters(adapters, parts.key_of(config, NUMBER)),
        frozen=parts.no_reference(adapters),
        largest_batch=largest_batch,
    )


def load(config: TrainConfig, inputs: Inputs) -> TokenizedData:
    """Responses to imitate."""
    del config
    inputs.check_length()
    return dataclasses.replace(inputs.pairs.responses(), shard=inputs.shard)


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Responses on the mesh, packed or not."""
    del frozen
    check_batches_known(context, stage)
    return parts.feed(with_packing(context, stage), stage, params)


KIND = Kind(
    name=NAME,
    adapters=parts.run_adapters,
    build=build,
    load=load,
    feed=feed,
    finish=parts.finish,
)
