"""`jaxalign train EXPERIMENT`: from a config to a trained, exported and reported model."""

import dataclasses
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.commands.drive import World, drive, of_step
from jaxalign.commands.experiment import parse
from jaxalign.commands.exports import export_model, keep_generation_config
from jaxalign.commands.inputs import INPUTS, check_examples
from jaxalign.commands.online import check_online, load_prompts, run_online
from jaxalign.commands.rates import LARGE, high_rates
from jaxalign.commands.rematerialisation import with_remat
from jaxalign.commands.report import print_table
from jaxalign.commands.representation import load_stimuli, run_representation
from jaxalign.commands.run_folder import run_folder
from jaxalign.commands.scores import (
    check_start,
    take_head,
    trains_scores,
    with_own_head,
)
from jaxalign.commands.stages import (
    STAGES,
    as_model,
    embedded_config,
    stage_adapters,
    stage_folder,
    with_adapter,
    write_model_config,
)
from jaxalign.commands.training_data import (
    check_tokens,
    count_computed,
    count_tokens,
    load_stages,
    load_tokenizer_for,
)
from jaxalign.commands.updates import (
    frozen_parameters,
    has_reference,
    keeps_reference_live,
    kept_parameters,
    make_objective,
    make_policy,
    make_update_rule,
    make_watch,
    stage_step,
    trained_parameters,
)
from jaxalign.config import StageConfig, TrainConfig
from jaxalign.data import check_vocabulary
from jaxalign.errors import UserError
from jaxalign.files import digest
from jaxalign.losses.lookup import find_loss
from jaxalign.models import load_pretrained
from jaxalign.models.decoder import init_params
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.lora import merge, stack
from jaxalign.models.peft import save_adapters
from jaxalign.models.score import SCORE
from jaxalign.progress import saying
from jaxalign.reporting import comparison, online, read_run, representation, write_report
from jaxalign.reporting.report import skipped_updates
from jaxalign.sharding import batch_sharding, make_mesh, place
from jaxalign.sharding.processes import ending_together, in_turn, share_of_rows, start
from jaxalign.training.checkpoints import newest_step, newest_whole_step
from jaxalign.training.evaluation import (
    evaluate_losses,
    evaluate_preferences,
    evaluate_scores,
)
from jaxalign.training.loop import Stopped, Throughput
from jaxalign.training.masking import whole_responses
from jaxalign.training.metrics import JsonLines, TensorBoard, WeightsAndBiases, Writer, rewind
from jaxalign.training.objectives import PreferenceObjective, ReferencedBatch
from jaxalign.training.reference import precompute_reference
from jaxalign.training.step import TrainState, compile_step
from jaxalign.training.throughput import flops_per_token, peak_flops


def main(arguments: Sequence[str]) -> int:
    """Parse, train, report."""
    config = parse(arguments)
    start()
    with ending_together("train"):
        try:
            train(config)
        except Stopped as stopped:
            print(
                f"jaxalign train: {stopped}; run the same command again to resume", file=sys.stderr
            )
            return 143
    return 0


def train(config: TrainConfig) -> Path:
    """Run or resume the stages of a config; returns the run folder."""
    enable_compilation_cache()
    find_loss(config.loss, config.loss_options)  # a wrong one is refused before any training
    if config.online.runs:
        check_online(config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_batches(config, mesh)
    with run_folder(config) as folder:
        _train(config, mesh, folder)
    return folder


def _train(config: TrainConfig, mesh: Mesh, folder: Path) -> None:
    """Run or resume the stages in the run folder, which is this command's alone."""
    resumed = find_checkpoints(config, folder)
    tokenizer = load_tokenizer_for(config, folder)
    model_config, params = initial_model(config, tokenizer, mesh)
    if jax.process_index() == 0:
        warn_of_rates(config, params)
    check_start(config, params)
    check_vocabulary(tokenizer, model_config.vocab_size)
    write_model_config(folder, model_config)
    keep_generation_config(config, folder)
    data: dict[str, Any] = load_stages(config, tokenizer, folder, model_config, share_of_rows(mesh))
    if config.online.runs:
        data["online"] = load_prompts(config, tokenizer, folder, model_config)
    if config.representation.runs:
        data["representation"] = load_stimuli(config, tokenizer, folder, model_config)
    check_tokens(tuple(data.values()), tokenizer, model_config.vocab_size)
    config = with_steps(config, data)
    if jax.process_index() == 0:
        check_examples(folder, data)
        rewind(folder / "metrics.jsonl", resumed)
    world = World(
        config=config,
        folder=folder,
        mesh=mesh,
        model_config=model_config,
        tokenizer=tokenizer,
        data=data,
        writers=make_writers(config, folder, resumed),
    )
    adapters = []
    try:
        for name in STAGES:
            if getattr(config, name).runs:
                params, trained = RUNS.get(name, run)(with_remat(world, name), name, params)
                if trained is not None:  # so the next stage's reference is what this one made
                    params = place(merge(params, trained, config.lora.scale), mesh)
                    adapters.append(trained)
    finally:
        for writer in world.writers:
            writer.close()
    if config.export:
        export(world, params, adapters)
    if jax.process_index() == 0:
        report(folder)


def warn_of_rates(config: TrainConfig, params: Any) -> None:
    """A line for each stage that would soon overwrite what the loaded weights know."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if config.model == "embedded" or size < LARGE:
        return
    for name, high in high_rates(config).items():
        print(f"{name}: {high}: expect {config.model} to lose what it knows", file=sys.stderr)


def with_steps(config: TrainConfig, data: Mapping[str, Any]) -> TrainConfig:
    """The config with steps for every stage that is told its epochs, now that its data is known.

    Args:
      config: of the run.
      data: of its stages, by their names; a stage's `examples(seed)` is the rows of an epoch.

    Raises:
      UserError: the steps are fewer than those of the stage's warm-up.
    """
    for name in STAGES:
        stage: StageConfig = getattr(config, name)
        if stage.epochs:
            rows = data[name].examples(config.seed)
            steps = math.ceil(rows * stage.epochs / stage.batch_size)
            config = dataclasses.replace(
                config, **{name: dataclasses.replace(stage, steps=steps, epochs=0.0)}
            )
            if jax.process_index() == 0:
                print(
                    f"{name}: {steps:,} steps, {stage.epochs:g} epochs of {rows:,} rows in batches "
                    f"of {stage.batch_size}"
                )
    return config


RUNS = {"online": run_online, "representation": run_representation}
"""Stages with a run of their own."""


def check_batches(config: TrainConfig, mesh: Mesh) -> None:
    """Every device gets as many rows of a batch as the others."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for name in STAGES:
        stage: StageConfig = getattr(config, name)
        if stage.runs and stage.batch_size % rows:
            raise UserError(
                f"{name}.batch_size: {stage.batch_size} is not a multiple of data x fsdp = {rows}"
            )


def report(folder: Path) -> None:
    """The table in the terminal, and the report in the run folder."""
    finished = read_run(folder)
    header, rows = comparison([finished])
    path = write_report([finished], folder / "report")
    if rows:
        print_table(header, rows)
    for stage in (online, representation):
        if stage.has_stage(finished):
            header, rows = stage.table([finished])
            if rows:
                print_table(header, rows)
    for line in skipped_updates(finished):
        print(line)
    print(f"report: {path}")


def initial_model(config: TrainConfig, tokenizer: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The architecture and the parameters to start from, placed on the mesh in float32."""
    if config.adapter is not None and config.model == "embedded":
        raise UserError("adapter: needs the model it was trained on; set --model")
    if config.model != "embedded":
        model = load_pretrained(config.model, dtype=jnp.float32, mesh=mesh)
        return model.config, place(with_adapter(config, model.config, model.params), mesh)
    model_config = embedded_config(config.architecture, len(tokenizer))
    params = init_params(model_config, jax.random.key(config.seed))
    return model_config, place(params, mesh)


def find_checkpoints(config: TrainConfig, folder: Path) -> dict[str, int]:
    """The step from which each stage resumes; damaged checkpoints are named and set aside."""
    with in_turn("checkpoints"):
        if jax.process_index() == 0:
            stop = config.damaged_checkpoints == "stop"
            for name in STAGES:
                newest_whole_step(stage_folder(folder, name), stop=stop, set_aside=True)
    newest = {name: newest_step(stage_folder(folder, name)) for name in STAGES}
    return {name: step for name, step in newest.items() if step is not None}


def make_writers(config: TrainConfig, folder: Path, resumed: Mapping[str, int]) -> list[Writer]:
    """JSON Lines and TensorBoard always, Weights & Biases where asked; on process 0 alone."""
    if jax.process_index() != 0:
        return []
    writers: list[Writer] = [
        JsonLines(folder / "metrics.jsonl"),
        TensorBoard(folder / "tensorboard", resumed),
    ]
    if config.wandb_project:
        values = json.loads((folder / "config.json").read_text())
        writers.append(WeightsAndBiases(config.wandb_project, config.name, values, folder))
    return writers


def run(world: World, name: str, params: Any) -> tuple[Any, Any]:
    """One stage, from its newest checkpoint or from the start.

    Returns:
      The trained parameters and None; or the frozen ones and the trained adapters.
    """
    config, mesh = world.config, world.mesh
    stage: StageConfig = getattr(config, name)
    scored = trains_scores(config, name)
    is_preference = name == "preference" and not scored
    adapted = stage_adapters(config, name) is not None
    if scored:
        params = with_own_head(config, world.model_config.width, params)
        params[SCORE] = place(params[SCORE], mesh)
    policy = make_policy(config, name, world.model_config)
    objective = make_objective(config, name, policy)
    optimizer, schedule = make_update_rule(config, name)
    trained = trained_parameters(config, name, world.model_config, params)
    frozen = frozen_parameters(config, name, objective, params, functools.partial(place, mesh=mesh))
    data = world.data[name]
    place_batch, precomputed = feed(world, name, objective, frozen)
    evaluation = data.evaluation(stage.batch_size)
    one_step = functools.partial(stage_step, config, name, objective, optimizer)
    watch, every = make_watch(config, name, objective), config.entanglement.every

    def make_step(state: TrainState) -> Callable[[int], Callable]:
        plain = saying(compile_step(one_step(), state, mesh), of_step("the step"))
        if watch is None:
            return lambda done: plain
        seen = saying(compile_step(one_step(watch), state, mesh), of_step("the watched step"))
        return lambda done: plain if done % every else seen

    live = is_preference and has_reference(objective) and not precomputed
    throughput = Throughput(
        tokens=count_tokens,
        computed=count_computed,
        flops_per_token=flops_per_token(params, live_reference=live, adapters=adapted),
        peak_flops=peak_flops(),
    )
    evaluate_with = None
    if evaluation:
        evaluator: Any = evaluate_preferences if is_preference else evaluate_losses
        evaluator = evaluate_scores if scored else evaluator
        evaluate_with = evaluator(whole_responses(objective), evaluation, mesh)
    state = drive(
        world,
        name,
        trained=trained,
        frozen=frozen,
        optimizer=optimizer,
        schedule=schedule,
        batches=data.batches(stage.batch_size, seed=config.seed),
        make_step=make_step,
        place_batch=place_batch,
        describe=data.describe,
        evaluation=evaluate_with,
        throughput=throughput,
        running=objective.statistics.start if isinstance(objective, PreferenceObjective) else None,
    )
    trained = kept_parameters(config, name, state.params)
    return take_head(params, trained) if adapted else (trained, None)


def feed(
    world: World, name: str, objective: Any, frozen: Mapping[str, Any]
) -> tuple[Callable[[Any], Any], bool]:
    """How batches reach the devices, and whether the reference's log-probs come with them."""
    config, mesh, data = world.config, world.mesh, world.data[name]
    sharding = batch_sharding(mesh)

    def put(batch: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
        )

    if name != "preference" or trains_scores(config, name):
        return put, False
    if not has_reference(objective) or keeps_reference_live(config, objective, len(data.train)):
        return lambda batch: put(ReferencedBatch(pairs=batch, reference=None)), False
    table = precompute_reference(
        objective,
        frozen["reference"],
        data.once(data.train, config.preference.batch_size),
        put,
        world.folder / "reference_log_probs.npz",
        mesh,
        digest(world.folder / INPUTS),
    )

    def put_with_reference(batch: Any) -> Any:
        return put(ReferencedBatch(pairs=batch, reference=table[batch.record_index]))

    return put_with_reference, True


def export(world: World, params: Any, adapters: Sequence[Any]) -> None:
    """A Hugging Face folder with the weights (adapters merged in) and the tokenizer.

    The adapters of all stages, as one of their summed rank, go into a folder `adapter` that PEFT
    opens.
    """
    config, lora = world.config, world.config.lora
    if adapters:
        changed = config.model == "embedded" or config.pretrain.runs or config.adapter
        save_adapters(
            world.folder / "adapter",
            functools.reduce(stack, adapters),
            world.model_config,
            rank=lora.rank * len(adapters),
            alpha=lora.alpha * len(adapters),
            dropout=lora.dropout,
            base_model=None if changed else config.model,
            head=params.get(SCORE),
        )
    folder = world.folder / "export"
    if jax.process_index() == 0 and folder.exists():
        shutil.rmtree(folder)
    model, step = as_model(world.model_config, params), config.preference.steps
    export_model(world.folder, config, model, folder, tokenizer=world.tokenizer, step=step)
