"""The model of a run, from its checkpoints."""

import functools
from pathlib import Path
from typing import Any

import jax

from jaxalign.errors import UserError
from jaxalign.models import load_pretrained
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import merge
from jaxalign.runs.inputs import check_inputs, input_digests
from jaxalign.sharding import make_mesh, place
from jaxalign.stages import KINDS, kind_of, kinds_of, pretraining
from jaxalign.stages.models import (
    as_model,
    read_model_config,
    read_run_config,
    stage_folder,
    with_adapter,
)
from jaxalign.stages.scores import take_head
from jaxalign.stages.shapes import shapes_of
from jaxalign.training.checkpoints import Checkpoints, checkpoint_steps, damage, newest_whole_step
from jaxalign.training.step import initial_state, saved_fields


def run_model(folder: Path, stage: str | None, step: int | None) -> tuple[Any, int]:
    """The model of a run's checkpoint, adapters merged in, and the checkpoint's step.

    Args:
      folder: of the run.
      stage: of the run; None: the last.
      step: of the stage; None: the newest intact checkpoint.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    config = read_run_config(folder)
    kinds = kinds_of(config)
    kind = kind_of(config, stage) if stage else kinds[-1]
    model_config = read_model_config(folder)
    mesh = make_mesh()
    saved = stage_folder(folder, kind.name)
    at = newest_whole_step(saved) if step is None else step
    if at is None or at not in checkpoint_steps(saved):
        there = ", ".join(map(str, checkpoint_steps(saved))) or "none"
        wanted = "intact checkpoint" if step is None else f"checkpoint {step}"
        others = [one.name for one in KINDS if checkpoint_steps(stage_folder(folder, one.name))]
        raise UserError(
            f"{folder}: stage {kind.name} has no {wanted}; its checkpoints are {there}, and stages "
            f"with checkpoints are {', '.join(others) or 'none'}"
        )
    if step is not None and (fault := damage(saved / str(step))) is not None:
        raise UserError(f"{fault}; the checkpoint is damaged: restore it, or set another --step")
    built = kind.build(config, model_config)
    fresh = functools.partial(
        initial_state, optimizer=built.optimizer, seed=config.seed, moving=built.moving
    )
    like = saved_fields(jax.eval_shape(fresh, shapes_of(built, model_config).state.params))
    with Checkpoints(saved, read_only=True) as checkpoints:
        fields, _ = checkpoints.restore(at, like, mesh)
    learned, lora = built.kept(fields["params"]), kind.adapters(config)
    if lora is None:
        return as_model(model_config, learned), at
    before = [one.name for one in kinds[: [one.name for one in kinds].index(kind.name)]]
    if before:
        base = run_model(folder, before[-1], None)[0].params
    else:
        base = run_base(folder, model_config)
    base, adapters = take_head(place(base, mesh), learned)
    return as_model(model_config, merge(base, adapters, lora.scale)), at


def run_base(folder: Path, model_config: ModelConfig) -> Any:
    """The parameters under a run's adapters: the initial model, or the result of pretraining."""
    config = read_run_config(folder)
    if config.pretrain.runs:
        return run_model(folder, pretraining.NAME, None)[0].params
    if config.model != "embedded":
        if faults := check_inputs(folder, input_digests(config), ("model", "adapter")):
            raise UserError(f"{faults[0]}; restore it: the run's adapters fit no other model")
        return with_adapter(config, model_config, load_pretrained(config.model).params)
    assert isinstance(model_config, DecoderConfig)  # of `embedded_config`
    return init_params(model_config, jax.random.key(config.seed))
