"""The representation stage of a run, from its config: stimuli, models, fit, and what it leaves."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.commands.drive import World, drive, of_step
from jaxalign.commands.scores import chat_of
from jaxalign.commands.stages import STAGES
from jaxalign.commands.training_data import PreferenceData, instructions_of, tokenization
from jaxalign.commands.updates import (
    frozen_parameters,
    make_objective,
    make_policy,
    make_reader,
    make_update_rule,
    stage_step,
    trained_parameters,
)
from jaxalign.config import AlignmentConfig, TrainConfig
from jaxalign.data import TokenizedPairs, TokenizedRows, pair_batches, tokenize_pairs
from jaxalign.errors import UserError
from jaxalign.files import read_json, write_json
from jaxalign.losses import dpo
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.lora import merge
from jaxalign.models.peft import save_adapters
from jaxalign.progress import saying
from jaxalign.representation import (
    StimulusBatch,
    responses_of,
    stimulus_batches,
    tokenize_stimuli,
)
from jaxalign.sharding import batch_sharding, place
from jaxalign.sharding.processes import share_of_rows
from jaxalign.training.evaluation import Evaluation, evaluate_losses, evaluate_preferences
from jaxalign.training.loop import Throughput
from jaxalign.training.objectives import PreferenceObjective
from jaxalign.training.step import TrainState, compile_step
from jaxalign.training.throughput import flops_per_token, peak_flops

POSITIONS = {"scit": 512, "dual": 64}
RESPONSES = {"scit": "random", "dual": "both"}
"""The paper's settings, where a config has none."""


@dataclass(frozen=True, kw_only=True)
class StimulusData:
    """What the stage fits, and the pairs on which it is held to account."""

    train: Sequence[TokenizedRows]
    """Plain rows; with two instructions also those under the positive and the negative one."""
    held_out: Sequence[TokenizedRows]
    """The same of held-out pairs; empty: none."""
    pairs: TokenizedPairs | None
    """Held-out pairs under the plain prompt."""
    places: Sequence[str]
    """Where each training response came from."""

    def examples(self, seed: int) -> int:
        """Responses of an epoch."""
        del seed
        return len(self.train[0])

    def describe(self, batch: StimulusBatch) -> list[str]:
        """File and line of a batch's responses."""
        numbers = np.asarray(batch.record_index)[np.asarray(batch.weight) > 0]
        return [self.places[int(number)] for number in numbers]


def load_stimuli(
    config: TrainConfig, tokenizer: Any, folder: Path, model_config: Any
) -> StimulusData:
    """Read, split and tokenise what the stage reads; add its counts to `data.json`.

    Raises:
      UserError: a record that cannot be used, no stimulus that fits, or a model without layers to
        read.
    """
    make_reader(config, model_config)
    report: dict[str, Any] = {}
    options = {name: getattr(config, name) for name in ("max_length", "prompt_format")}
    options |= {"end_token": config.end_token, "chat": chat_of(config)}
    read = PreferenceData(config, tokenizer, options | {"encoder_decoder": False}, {})
    told, wanted = instructions_of(config), config.alignment
    streams: tuple[str | None, ...] = (None,)
    if wanted.method == "scit":
        streams = (None, told.positive, told.negative)
    which: Any = wanted.responses or RESPONSES[wanted.method]

    def stimuli(records: Any, name: str) -> tuple[TokenizedRows, ...]:
        found = tokenize_stimuli(records, tokenization(config, tokenizer), streams)
        report[name] = dataclasses.asdict(found.report)
        return found.streams

    train = responses_of(read.train, which, seed=config.seed)
    held_out, pairs = (), None
    if read.held_out:
        held_out = stimuli(responses_of(read.held_out, "both"), "held_out_stimuli")
        pairs, counted = tokenize_pairs(read.held_out, tokenizer, **options)
        report["held_out_plain_pairs"] = dataclasses.asdict(counted)
    data = StimulusData(
        train=stimuli(train, "train_stimuli"),
        held_out=held_out,
        pairs=pairs,
        places=[f"{record.source}:{record.line}" for record in train],
    )
    if jax.process_index() == 0:
        path = folder / "data.json"
        write_json(path, read_json(path, "counts of a run's data") | report)
    return data


def run_representation(world: World, name: str, params: Any) -> tuple[Any, Any]:
    """The representation stage, from its newest checkpoint or from the start.

    Returns:
      The parameters with the fitted adapters merged in, and None; the adapters by themselves are
      left in the run folder's `representation_adapter`.
    """
    config, mesh, stage = world.config, world.mesh, world.config.representation
    wanted = config.alignment
    lora, data = wanted.lora, world.data[name]
    assert isinstance(data, StimulusData)
    policy = make_policy(config, name, world.model_config)
    objective = make_objective(config, name, policy)
    optimizer, schedule = make_update_rule(config, name)
    adapters = trained_parameters(config, name, world.model_config, params)
    frozen = frozen_parameters(config, name, objective, params, functools.partial(place, mesh=mesh))
    frozen |= stimulus_models(wanted, functools.partial(load_like, world))
    number, count = share_of_rows(mesh)
    mine = {"process_index": number, "process_count": count}
    sharding = batch_sharding(mesh)

    def put(batch: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
        )

    def batches(streams: Sequence[TokenizedRows], **order: Any) -> Any:
        return stimulus_batches(
            streams[0],
            streams[1:],
            batch_size=stage.batch_size,
            positions=wanted.positions or POSITIONS[wanted.method],
            **mine,
            **order,
        )

    evaluation = None
    if data.held_out and data.pairs is not None:
        fixed = {"epochs": 1, "shuffle": False}
        pairs = list(pair_batches(data.pairs, batch_size=stage.batch_size, **mine, **fixed))
        implicit = PreferenceObjective(policy=policy, loss=dpo, options={"beta": 1.0})
        evaluation = of_both(
            evaluate_preferences(implicit, pairs, mesh),
            evaluate_losses(objective, list(batches(data.held_out, **fixed)), mesh),
        )
    one_step = stage_step(config, name, objective, optimizer)

    def make_step(state: TrainState) -> Callable[[int], Callable]:
        compiled = saying(compile_step(one_step, state, mesh), of_step("the step"))
        return lambda done: compiled

    state = drive(
        world,
        name,
        trained=adapters,
        frozen=frozen,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches(data.train, seed=config.seed),
        make_step=make_step,
        place_batch=put,
        describe=data.describe,
        evaluation=evaluation,
        throughput=Throughput(
            tokens=count_plain,
            computed=count_plain,
            flops_per_token=flops_per_token(params, live_reference=True, adapters=True),
            peak_flops=peak_flops(),
        ),
    )
    changed = config.model == "embedded" or config.adapter is not None
    changed |= any(getattr(config, other).runs for other in STAGES[: STAGES.index(name)])
    save_adapters(
        world.folder / "representation_adapter",
        state.params,
        world.model_config,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        base_model=None if changed else config.model,
        head=None,
    )
    return place(merge(params, state.params, lora.scale), mesh), None


def of_both(preferences: Evaluation, fit: Evaluation) -> Evaluation:
    """Held-out preferences (rewards are log-ratios in nats) and how well the states fit."""
    return lambda state, frozen: preferences(state, frozen) | fit(state, frozen)


def stimulus_models(wanted: AlignmentConfig, load: Callable[[str, str], Any]) -> dict[str, Any]:
    """The parameters of the models that read the stimuli; None where the base itself does.

    Args:
      wanted: whose models.
      load: (the folder's field, the folder) -> its parameters.
    """
    names = ("positive_model", "negative_model")
    folders = {name: getattr(wanted, name) if wanted.method == "dual" else None for name in names}
    return {
        name.removesuffix("_model"): None if folder is None else load(name, folder)
        for name, folder in folders.items()
    }


def load_like(world: World, name: str, folder: str) -> Any:
    """The parameters in a folder, which are to be of the run's own architecture.

    Raises:
      UserError: they are of another one.
    """
    loaded = load_pretrained(folder, dtype=jnp.float32, mesh=world.mesh)
    if not isinstance(loaded.config, DecoderConfig) or loaded.config != world.model_config:
        raise UserError(
            f"alignment.{name}: {folder} is of another architecture than {world.config.model}; "
            "tune both from one model"
        )
    return place(loaded.params, world.mesh)


@jax.jit
def count_plain(batch: StimulusBatch) -> jax.Array:
    """Tokens of the trained rows; stimuli are read on top."""
    return jnp.sum(batch.prompt_length + jnp.sum(batch.mask, axis=1))
