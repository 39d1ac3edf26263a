"""`jaxalign convert SOURCE TARGET`: run, Orbax folder or GGUF to Hugging Face, or that to Orbax."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from tyro.conf import Positional, arg

from jaxalign.commands.arguments import parse
from jaxalign.commands.exports import export_model
from jaxalign.commands.inputs import check_inputs, input_digests
from jaxalign.commands.scores import take_head, trains_scores
from jaxalign.commands.stages import (
    as_model,
    parameter_structs,
    read_model_config,
    read_run_config,
    stage_adapters,
    stage_folder,
    trained_stages,
    with_adapter,
    write_model_config,
)
from jaxalign.commands.updates import (
    kept_parameters,
    make_update_rule,
    trained_parameters,
)
from jaxalign.config import Count
from jaxalign.errors import UserError
from jaxalign.files import check_output, replacing, write_json
from jaxalign.gguf import is_gguf
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.lora import merge
from jaxalign.sharding import make_mesh, parameter_shardings, place
from jaxalign.training.checkpoints import Checkpoints, checkpoint_steps, damage, newest_whole_step
from jaxalign.training.step import initial_state


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run folder, Orbax folder or GGUF file -> Hugging Face folder; Hugging Face -> Orbax folder.

    SOURCE decides which of them it is.
    """

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Model to convert: run folder, Orbax folder, GGUF file, Hugging Face folder or Hub name."""
    target: Positional[Annotated[Path, arg(metavar="TARGET")]]
    """Folder to create; it must not exist."""
    stage: Literal["pretrain", "sft", "preference", "online", "representation"] | None = None
    """Stage of a run folder; None: its last."""
    step: Count | None = None
    """Step of a run folder; None: its newest checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the written weights."""


def main(arguments: Sequence[str]) -> int:
    """Convert; which way is read from what SOURCE is."""
    options = parse(Options, "convert", arguments)
    if os.path.lexists(options.target):
        raise UserError(f"{options.target}: exists already; name a folder that does not")
    check_output(options.target, "TARGET")
    source, dtype = Path(options.source), jnp.dtype(options.dtype)
    if (source / "checkpoints").is_dir():
        export_run(source, options.target, stage=options.stage, step=options.step, dtype=dtype)
    elif (source / "params").is_dir():
        model = orbax_model(source)
        with replacing(options.target) as target:
            save_pretrained(model, target, dtype=dtype)
    elif is_gguf(source) and not source.is_dir():
        gguf_to_hugging_face(source, options.target, dtype)
    else:
        hugging_face_to_orbax(options.source, options.target, dtype)
    print(options.target)
    return 0


def export_run(
    folder: Path, target: Path, *, stage: str | None, step: int | None, dtype: Any
) -> None:
    """Write the model of a run's checkpoint as the end of a run does."""
    from jaxalign.data import load_tokenizer

    config, tokenizer = read_run_config(folder), load_tokenizer(folder / "tokenizer")
    model, step = run_model(folder, stage, step)
    with replacing(target) as scratch:
        export_model(folder, config, model, scratch, tokenizer=tokenizer, step=step, dtype=dtype)


def run_model(folder: Path, stage: str | None, step: int | None) -> tuple[Any, int]:
    """The model of a run's checkpoint, adapters merged in, and the checkpoint's step.

    Args:
      folder: of the run.
      stage: of the run; None: its last.
      step: of the stage; None: its newest whole checkpoint.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    config = read_run_config(folder)
    stage = stage or trained_stages(config)[-1]
    model_config = read_model_config(folder)
    mesh = make_mesh()
    saved = stage_folder(folder, stage)
    wanted = newest_whole_step(saved) if step is None else step
    if wanted is None or wanted not in checkpoint_steps(saved):
        there = ", ".join(map(str, checkpoint_steps(saved))) or "none"
        raise UserError(f"{folder}: stage {stage} has no checkpoint {step}; there: {there}")
    if step is not None and (fault := damage(saved / str(step))) is not None:
        raise UserError(f"{fault}; the checkpoint is damaged: restore it, or set another --step")
    optimizer, _ = make_update_rule(config, stage)
    structs = parameter_structs(model_config, scored=trains_scores(config, stage))

    def fresh(params: Any) -> Any:
        trained = trained_parameters(config, stage, model_config, params)
        return initial_state(trained, optimizer, seed=config.seed)

    with Checkpoints(saved, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(wanted, jax.eval_shape(fresh, structs), mesh)
    learned, lora = kept_parameters(config, stage, state.params), stage_adapters(config, stage)
    if lora is None:
        return as_model(model_config, learned), wanted
    stages = trained_stages(config)
    before = stages[: stages.index(stage)]
    if before:
        base = run_model(folder, before[-1], None)[0].params
    else:
        base = run_base(folder, model_config)
    base, adapters = take_head(place(base, mesh), learned)
    return as_model(model_config, merge(base, adapters, lora.scale)), wanted


def run_base(folder: Path, model_config: Any) -> Any:
    """The parameters under a run's adapters: the model it was started from, or its pretraining."""
    config = read_run_config(folder)
    if config.pretrain.runs:
        return run_model(folder, "pretrain", None)[0].params
    if config.model != "embedded":
        if faults := check_inputs(folder, input_digests(config), ("model", "adapter")):
            raise UserError(f"{faults[0]}; restore it: the run's adapters belong to it alone")
        return with_adapter(config, model_config, load_pretrained(config.model).params)
    from jaxalign.models.decoder import init_params

    return init_params(model_config, jax.random.key(config.seed))


def gguf_to_hugging_face(source: Path, target: Path, dtype: Any) -> None:
    """The folder that the file was made from, its weights dequantised."""
    from jaxalign.data import load_tokenizer
    from jaxalign.models.gguf import generation_fields

    tokenizer, model = load_tokenizer(source), load_pretrained(source, dtype=dtype)
    with replacing(target) as scratch:
        save_pretrained(model, scratch, tokenizer=tokenizer)
        write_json(scratch / "generation_config.json", generation_fields(source))


def hugging_face_to_orbax(source: str, target: Path, dtype: Any) -> None:
    """Weights as an Orbax checkpoint `params` beside `model.json`."""
    import orbax.checkpoint as ocp

    model = load_pretrained(source, dtype=dtype)
    with replacing(target) as scratch:
        scratch.mkdir()
        write_model_config(scratch, model.config)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((scratch / "params").absolute(), model.params)


def orbax_model(folder: Path) -> Any:
    """The model of an Orbax folder."""
    import orbax.checkpoint as ocp

    model_config = read_model_config(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        path = (folder / "params").absolute()
        stored = checkpointer.metadata(path).item_metadata.tree
        shardings = parameter_shardings(stored, make_mesh())
        like = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), stored, shardings
        )
        return as_model(model_config, checkpointer.restore(path, like))
