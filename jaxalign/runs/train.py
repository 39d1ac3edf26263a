"""Run a config: train, export and report."""

import dataclasses
import functools
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.config import TrainConfig
from jaxalign.data import check_vocabulary
from jaxalign.errors import UserError, notice
from jaxalign.files import write_json
from jaxalign.losses.lookup import find_loss
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.lora import merge, stack
from jaxalign.models.peft import MERGED_ONLY, save_adapters, unwritable
from jaxalign.models.score import SCORE
from jaxalign.reporting import read_run, write_report
from jaxalign.reporting.runs import STEPS
from jaxalign.runs.exports import export_model, keep_generation_config
from jaxalign.runs.folder import run_folder
from jaxalign.runs.inputs import check_examples
from jaxalign.runs.rates import LARGE, high_rates
from jaxalign.sharding import make_mesh, place, row_parts
from jaxalign.sharding.processes import data_shard, in_turn
from jaxalign.stages import KINDS, Kind, RunContext, kinds_of
from jaxalign.stages.inputs import Inputs, check_tokens, load_tokenizer_for
from jaxalign.stages.models import (
    as_model,
    home_of,
    initial_model,
    keep,
    stage_folder,
    write_model_config,
)
from jaxalign.stages.rematerialisation import with_remat
from jaxalign.stages.run import run
from jaxalign.stages.scores import check_start
from jaxalign.training.checkpoints import newest_step, newest_whole_step
from jaxalign.training.metrics import JsonLines, TensorBoard, WeightsAndBiases, Writer, rewind


def train(config: TrainConfig) -> Path:
    """Run or resume the stages of a config; returns the run folder.

    Raises:
      UserError: the config, its files or the run folder cannot be used.
      Stopped: SIGTERM was received; everything is saved.
    """
    enable_compilation_cache()
    find_loss(config.preference.loss, config.preference.loss_options)  # raises before any training
    kinds = kinds_of(config)
    for kind in kinds:
        kind.check(config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_batches(kinds, config, mesh)
    with run_folder(config) as folder:
        _train(config, kinds, mesh, folder)
    return folder


def _train(config: TrainConfig, kinds: Sequence[Kind], mesh: Mesh, folder: Path) -> None:
    """Run or resume the stages in the locked run folder."""
    is_main = jax.process_index() == 0
    resumed = find_checkpoints(config, folder)
    tokenizer = load_tokenizer_for(config, folder)
    model_config, params = initial_model(config, tokenizer, mesh)
    if is_main:
        warn_of_rates(config, params)
    check_start(config, params)
    check_vocabulary(tokenizer, model_config.vocab_size)
    write_model_config(folder, model_config)
    keep_generation_config(config, folder)
    inputs = Inputs(config, tokenizer, folder, model_config, data_shard(mesh))
    data = {kind.name: kind.load(config, inputs) for kind in kinds}
    if is_main:
        write_json(folder / "data.json", inputs.report)
    check_tokens(tuple(data.values()), tokenizer, model_config.vocab_size)
    config = with_steps(config, data)
    for kind in kinds:
        config = kind.settle(config, data[kind.name])
    if is_main:
        steps = {kind.name: kind.settings(config).steps for kind in kinds}
        write_json(folder / STEPS, steps)
        check_examples(folder, data)
        rewind(folder / "metrics.jsonl", resumed)
    context = RunContext(
        config=config,
        folder=folder,
        mesh=mesh,
        model_config=model_config,
        tokenizer=tokenizer,
        data=data,
        writers=make_writers(config, folder, resumed),
    )
    del inputs
    adapters = []
    try:
        for kind in kinds:
            params, trained = run(kind, with_remat(kind, context), params)
            if trained is not None:  # so the next stage's reference is this result
                params = merged(params, trained, config, mesh)
                adapters.append(trained)
            elif (home := home_of(config, mesh)) is not mesh:
                params = keep(params, home)
    finally:
        for writer in context.writers:
            writer.close()
    if config.export:
        export(context, params, adapters)
    if is_main:
        write_report([read_run(folder)], folder / "report")


def merged(params: Any, trained: Any, config: TrainConfig, mesh: Mesh) -> Any:
    """The result of a stage with adapters, where the run keeps its model."""
    home = home_of(config, mesh)
    if home is mesh:
        return place(merge(params, trained, config.lora.scale), mesh)
    return merge(keep(params, home), keep(trained, home), config.lora.scale)


def warn_of_rates(config: TrainConfig, params: Any) -> None:
    """Print a warning for each stage whose learning rate is too high for pretrained weights."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if config.model == "embedded" or size < LARGE:
        return
    for name, high in high_rates(config).items():
        print(f"{name}: {high}: expect {config.model} to lose what it knows", file=sys.stderr)


def with_steps(config: TrainConfig, data: Mapping[str, Any]) -> TrainConfig:
    """The config with steps instead of epochs, given the size of the data.

    Args:
      config: of the run.
      data: of its stages, by name.

    Raises:
      UserError: a stage has fewer steps than its warm-up.
    """
    for kind in kinds_of(config):
        stage = kind.settings(config)
        if not stage.epochs:
            continue
        rows = data[kind.name].examples(config.seed)
        steps = math.ceil(rows * stage.epochs / stage.batch_size)
        fixed = dataclasses.replace(stage, steps=steps, epochs=0.0)
        config = dataclasses.replace(config, **{kind.name: fixed})
        if jax.process_index() == 0:
            epochs = "epoch" if stage.epochs == 1 else "epochs"
            print(
                f"{kind.name}: {steps:,} steps, {stage.epochs:g} {epochs} of {rows:,} rows in "
                f"batches of {stage.batch_size}"
            )
    return config


def check_batches(kinds: Sequence[Kind], config: TrainConfig, mesh: Mesh) -> None:
    """Raise `UserError` if a batch cannot be split equally over the devices."""
    rows = row_parts(mesh)
    for kind in kinds:
        if (size := kind.settings(config).batch_size) % rows:
            raise UserError(
                f"{kind.name}.batch_size: {size} is not a multiple of data x fsdp x expert = {rows}"
            )


def find_checkpoints(config: TrainConfig, folder: Path) -> dict[str, int]:
    """The step from which each stage resumes; damaged checkpoints are reported and set aside."""
    names = [kind.name for kind in KINDS]
    with in_turn("checkpoints"):
        if jax.process_index() == 0:
            stop = config.damaged_checkpoints == "stop"
            for name in names:
                newest_whole_step(stage_folder(folder, name), stop=stop, set_aside=True)
    newest = {name: newest_step(stage_folder(folder, name)) for name in names}
    return {name: step for name, step in newest.items() if step is not None}


def make_writers(config: TrainConfig, folder: Path, resumed: Mapping[str, int]) -> list[Writer]:
    """JSON Lines, TensorBoard and, if configured, Weights & Biases; only on process 0."""
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


def export(context: RunContext, params: Any, adapters: Sequence[Any]) -> None:
    """Write a Hugging Face folder with the weights (adapters merged in) and the tokenizer.

    The adapters of all stages are also written to a folder `adapter` for PEFT, as one adapter of
    their summed rank.
    """
    config, lora = context.config, context.config.lora
    if adapters and unwritable(adapters[0]):
        if jax.process_index() == 0:
            notice(MERGED_ONLY)
    elif adapters:
        changed = config.model == "embedded" or config.pretrain.runs or config.adapter
        save_adapters(
            context.folder / "adapter",
            functools.reduce(stack, adapters),
            context.model_config,
            rank=lora.rank * len(adapters),
            alpha=lora.alpha * len(adapters),
            dropout=lora.dropout,
            base_model=None if changed else config.model,
            head=params.get(SCORE),
        )
    if adapters and lora.weights != "float32" and jax.process_index() == 0:
        notice(
            f"export: adapters trained over {lora.weights} weights are merged into the float32 "
            "weights; its log-probs are not exactly those of the run"
        )
    folder = context.folder / "export"
    if jax.process_index() == 0 and folder.exists():
        shutil.rmtree(folder)
    model, step = as_model(context.model_config, params), config.preference.steps
    export_model(context.folder, config, model, folder, tokenizer=context.tokenizer, step=step)
