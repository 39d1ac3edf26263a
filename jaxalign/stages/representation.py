"""Representation alignment (RAHF): fit hidden states to those under better stimuli."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config import AlignmentConfig, TrainConfig
from jaxalign.data import TokenizedPairs, TokenizedRows, pair_batches, tokenize_pairs
from jaxalign.data.order import WINDOW
from jaxalign.data.packing import Packing
from jaxalign.errors import UserError, notice_once
from jaxalign.losses import dpo, hidden_state_distance, hidden_state_matching
from jaxalign.models.config import ModelConfig
from jaxalign.models.lora import merge
from jaxalign.models.peft import MERGED_ONLY, save_adapters, unwritable
from jaxalign.representation import (
    Reader,
    RepresentationObjective,
    StimulusBatch,
    default_layers,
    responses_of,
    stimulus_batches,
    stimulus_positions,
    tokenize_stimuli,
)
from jaxalign.sharding import place, shard_batch
from jaxalign.sharding.processes import data_shard
from jaxalign.stages import parts
from jaxalign.stages.inputs import Inputs, instructions_of, tokenization
from jaxalign.stages.kind import Kind, Outcome, RunContext
from jaxalign.stages.packing import with_packing
from jaxalign.stages.records import say, sources_of
from jaxalign.stages.structs import record_of, struct
from jaxalign.training.evaluation import (
    Evaluation,
    evaluate_losses,
    evaluate_preferences,
)
from jaxalign.training.objectives import PreferenceObjective
from jaxalign.training.stage import Feed, Params, Rows, Stage

NAME, NUMBER = "representation", 5
DISTANCES = {"squared": hidden_state_matching, "norm": hidden_state_distance}
"""`alignment.distance` -> its loss."""
POSITIONS = {"scit": 512, "dual": 64}
RESPONSES = {"scit": "random", "dual": "both"}
"""The paper's settings, where a config has none."""


@dataclass(frozen=True, kw_only=True)
class StimulusData:
    """Stimuli to fit, and held-out pairs for evaluation."""

    train: Sequence[TokenizedRows]
    """Plain rows; with two instructions, also the rows under the positive and negative one."""
    held_out: Sequence[TokenizedRows]
    """The same for held-out pairs; empty: none."""
    pairs: TokenizedPairs | None
    """Held-out pairs under the plain prompt."""
    sources: Sequence[str]
    """File and line of each training response."""
    packing: Packing | None = None
    """Rows of a packed training batch; None: padded."""

    def examples(self, seed: int) -> int:
        """Number of responses in an epoch."""
        del seed
        return len(self.train[0])

    def positions(self, packing: Packing | None, **order: Any) -> float:
        """Mean number of positions that the network computes for a training batch.

        Args:
          packing: number of packed rows; None: padded.
          **order: batch_size and seed.
        """
        return stimulus_positions(self.train[0], self.train[1:], packing, **order)

    def describe(self, batch: StimulusBatch) -> list[str]:
        """File and line of a batch's responses."""
        numbers = np.asarray(batch.record_index)[np.asarray(batch.weight) > 0]
        return [self.sources[int(number)] for number in numbers]


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that fits adapters to the hidden states under the better stimulus."""
    settings, alignment = config.representation, config.representation.alignment
    policy = parts.make_policy(config, model_config, alignment.lora)
    reader = make_reader(config, model_config, remat=policy.remat, dtype=policy.dtype)
    loss: Any = DISTANCES[alignment.distance]
    objective = RepresentationObjective(
        policy=policy, reader=reader, alpha=alignment.alpha, loss=loss
    )
    base = parts.with_reference(alignment.lora)

    def frozen(params: Params, copy: Any, load: Callable[[str, str], Params]) -> dict[str, Any]:
        return base(params, copy, load) | stimulus_models(alignment, load)

    return Stage(
        name=NAME,
        method=alignment.method,
        rows=f"responses of {config.max_length:,} tokens with their stimuli",
        **parts.plain_stage(settings, objective),
        trained=parts.trained_parameters(alignment.lora, parts.key_of(config, NUMBER)),
        frozen=frozen,
        largest_batch=lambda platform, response: largest_stimuli(config, objective),
    )


def make_reader(config: TrainConfig, model_config: ModelConfig, **options: Any) -> Reader:
    """Reader of the hidden states that a config selects.

    Raises:
      UserError: the model has no such layer.
    """
    depth, settings = getattr(model_config, "layers", 0), config.representation.alignment
    layers = settings.layers or default_layers(depth, settings.method)
    layers = tuple(sorted(set(layers)))
    reader = Reader(config=model_config, layers=layers, **options)
    if not 1 <= layers[0] <= layers[-1] <= depth:
        raise UserError(f"alignment.layers: {list(layers)}; the model has layers 1 to {depth}")
    return reader


def largest_stimuli(
    config: TrainConfig, objective: RepresentationObjective
) -> tuple[Any, list[Rows]]:
    """Shapes of the largest batch of plain rows and stimuli, and the passes of a step on it."""
    settings, rows = config.representation.alignment, config.representation.batch_size
    length = config.max_length
    positions = min(settings.positions or POSITIONS[settings.method], length)
    instructed = settings.method == "scit"
    batch = record_of(
        StimulusBatch,
        tokens=struct(rows, length),
        prompt_length=struct(rows),
        stimuli=struct(rows, 2, length) if instructed else None,
        stimuli_prompt_length=struct(rows, 2) if instructed else None,
        mask=struct(rows, positions, dtype=jnp.bool_),
        record_index=struct(rows),
        weight=struct(rows, dtype=jnp.float32),
    )
    reader = objective.reader
    shape = {"length": length, "scored": 0, "depth": reader.layers[-1] / reader.config.layers}
    read = 1 + (settings.positive_model is not None)  # also the pass of the base model
    others = Rows(rows=2 * rows, **shape, forward=1) if instructed else None
    others = others or Rows(rows=rows, **shape, forward=read)
    return batch, [Rows(rows=rows, **shape, forward=2, backward=1), others]


def load(config: TrainConfig, inputs: Inputs) -> StimulusData:
    """Read, split and tokenise the stimuli.

    Raises:
      UserError: a record cannot be used, all stimuli are too long, or the model has no such
        layers.
    """
    make_reader(config, inputs.model_config)
    report, pairs = inputs.report, inputs.pairs
    instructions, settings = instructions_of(config), config.representation.alignment
    streams: tuple[str | None, ...] = (None,)
    if settings.method == "scit":
        streams = (None, instructions.positive, instructions.negative)
    which: Any = settings.responses or RESPONSES[settings.method]

    def stimuli(records: Any, name: str) -> tuple[TokenizedRows, ...]:
        rows = tokenize_stimuli(records, tokenization(config, inputs.tokenizer), streams)
        report[name] = dataclasses.asdict(rows.report)
        say(f"{name.replace('_', ' ')}: {rows.report.summary()}")
        return rows.streams

    train = responses_of(pairs.train, which, seed=config.seed)
    held_out, plain = (), None
    if pairs.held_out:
        held_out = stimuli(responses_of(pairs.held_out, "both"), "held_out_stimuli")
        options: dict[str, Any] = inputs.options | {"encoder_decoder": False}
        plain, counted = tokenize_pairs(pairs.held_out, inputs.tokenizer, **options)
        report["held_out_plain_pairs"] = dataclasses.asdict(counted)
        say(f"held out plain pairs: {counted.summary()}")
    return StimulusData(
        train=stimuli(train, "train_stimuli"),
        held_out=held_out,
        pairs=plain,
        sources=sources_of(train),
    )


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Plain rows with their stimuli on the mesh, packed or not."""
    del frozen
    context = with_packing(context, stage)
    config, mesh, data = context.config, context.mesh, context.data[NAME]
    assert isinstance(data, StimulusData)
    settings = config.representation.alignment
    number, count = data_shard(mesh)
    mine = {"process_index": number, "process_count": count}
    whole = data.packing
    if whole is not None:
        whole = dataclasses.replace(whole, micro_batches=1)

    def batches(streams: Sequence[TokenizedRows], packing: Packing | None, **order: Any) -> Any:
        return stimulus_batches(
            streams[0],
            streams[1:],
            batch_size=stage.batch_size,
            positions=settings.positions or POSITIONS[settings.method],
            packing=packing,
            **mine,
            **order,
        )

    evaluation = None
    if data.held_out and data.pairs is not None:
        fixed: dict[str, Any] = {"epochs": 1, "shuffle": False, "window": WINDOW}
        pairs = list(pair_batches(data.pairs, batch_size=stage.batch_size, **mine, **fixed))
        policy = stage.objective.policy
        implicit = PreferenceObjective(policy=policy, loss=dpo, options={"beta": 1.0})
        evaluation = of_both(
            evaluate_preferences(implicit, pairs, mesh),
            evaluate_losses(stage.objective, list(batches(data.held_out, whole, **fixed)), mesh),
        )
    return Feed(
        batches=batches(data.train, data.packing, seed=config.seed),
        place=partial(shard_batch, mesh=mesh),
        describe=data.describe,
        evaluation=evaluation,
        throughput=parts.throughput(
            context.model_config, params, live_reference=True, adapters=True, tokens=count_plain
        ),
    )


def finish(context: RunContext, params: Params, kept: Params) -> Outcome:
    """The parameters with the adapters merged in; the adapters are also saved in the run folder."""
    config, lora = context.config, context.config.representation.alignment.lora
    before = (config.pretrain, config.sft, config.preference, config.online)
    changed = config.model == "embedded" or config.adapter is not None
    changed |= any(stage.runs for stage in before)
    if unwritable(kept):
        notice_once(MERGED_ONLY)
        return place(merge(params, kept, lora.scale), context.mesh), None
    save_adapters(
        context.folder / "representation_adapter",
        kept,
        context.model_config,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        base_model=None if changed else config.model,
        head=None,
    )
    return place(merge(params, kept, lora.scale), context.mesh), None


def of_both(preferences: Evaluation, fit: Evaluation) -> Evaluation:
    """Held-out metrics of preferences (rewards are log-ratios in nats) and of the fit."""
    return lambda state, frozen: preferences(state, frozen) | fit(state, frozen)


def stimulus_models(settings: AlignmentConfig, load: Callable[[str, str], Any]) -> dict[str, Any]:
    """The parameters of the models that read the stimuli; None: the base model.

    Args:
      settings: name the models.
      load: (the folder's field, the folder) -> its parameters.
    """
    names = ("positive_model", "negative_model")
    folders = {
        name: getattr(settings, name) if settings.method == "dual" else None for name in names
    }
    return {
        name.removesuffix("_model"): None if folder is None else load(f"alignment.{name}", folder)
        for name, folder in folders.items()
    }


@jax.jit
def count_plain(batch: StimulusBatch) -> jax.Array:
    """Number of tokens in the trained rows, without stimuli."""
    return jnp.sum(batch.prompt_length + jnp.sum(batch.mask, axis=1))


KIND = Kind(
    name=NAME,
    adapters=lambda config: config.representation.alignment.lora,
    build=build,
    load=load,
    feed=feed,
    finish=finish,
)
