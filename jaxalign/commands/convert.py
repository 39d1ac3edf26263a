"""`jaxalign convert SOURCE TARGET`: run folder or Orbax folder to Hugging Face, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.commands.arguments import parser, within
from jaxalign.commands.scores import exported_fields, take_head, trains_scores
from jaxalign.commands.stages import (
    STAGES,
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
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.lora import merge
from jaxalign.models.score import ScoreModel
from jaxalign.sharding import make_mesh, parameter_shardings, place
from jaxalign.training.checkpoints import Checkpoints, newest_step
from jaxalign.training.step import initial_state

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str]) -> int:
    """Convert; which way is read from what SOURCE is."""
    flags = parser(
        "convert",
        "Run folder or Orbax folder -> Hugging Face folder; Hugging Face -> Orbax folder.",
    )
    flags.add_argument("source", help="run folder, Orbax folder, Hugging Face folder or hub name")
    flags.add_argument("target", type=Path, help="folder to make; must not exist")
    flags.add_argument("--stage", choices=STAGES, help="of a run; default: its last")
    flags.add_argument(
        "--step", type=within(Count), help="of a run; default: the newest checkpoint"
    )
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    given = flags.parse_args(arguments)
    if given.target.exists():
        raise UserError(f"{given.target}: exists already; name a folder that does not")
    source, dtype = Path(given.source), jnp.dtype(given.dtype)
    if (source / "checkpoints").is_dir():
        model = run_model(source, given.stage, given.step)
        tokenizer, fields = _tokenizer(source), None
        if isinstance(model, ScoreModel):
            config, step = read_run_config(source), given.step
            step = newest_step(stage_folder(source, "preference")) if step is None else step
            fields = exported_fields(config, tokenizer, source, step)
        save_pretrained(model, given.target, tokenizer=tokenizer, dtype=dtype, fields=fields)
    elif (source / "params").is_dir():
        save_pretrained(orbax_model(source), given.target, dtype=dtype)
    else:
        hugging_face_to_orbax(given.source, given.target, dtype)
    print(given.target)
    return 0


def _tokenizer(run: Path) -> Any:
    """The tokenizer kept in a run folder."""
    from jaxalign.data import load_tokenizer

    return load_tokenizer(run / "tokenizer")


def run_model(folder: Path, stage: str | None, step: int | None) -> Any:
    """The model of a run's checkpoint, adapters merged in.

    Raises:
      UserError: there is no such checkpoint.
    """
    config = read_run_config(folder)
    stage = stage or trained_stages(config)[-1]
    model_config = read_model_config(folder)
    mesh = make_mesh()
    checkpoints = Checkpoints(stage_folder(folder, stage))
    step = checkpoints.latest() if step is None else step
    if step is None or step not in checkpoints.steps():
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(f"{folder}: stage {stage} has no checkpoint {step}; there: {there}")
    optimizer, _ = make_update_rule(config, stage)
    structs = parameter_structs(model_config, scored=trains_scores(config, stage))

    def fresh(params: Any) -> Any:
        trained = trained_parameters(config, stage, model_config, params)
        return initial_state(trained, optimizer, seed=config.seed)

    state, _ = checkpoints.restore(step, jax.eval_shape(fresh, structs), mesh)
    checkpoints.close()
    learned, lora = kept_parameters(config, stage, state.params), stage_adapters(config, stage)
    if lora is None:
        return as_model(model_config, learned)
    stages = trained_stages(config)
    before = stages[: stages.index(stage)]
    base = run_model(folder, before[-1], None).params if before else run_base(folder, model_config)
    base, adapters = take_head(place(base, mesh), learned)
    return as_model(model_config, merge(base, adapters, lora.scale))


def run_base(folder: Path, model_config: Any) -> Any:
    """The parameters under a run's adapters: the model it was started from, or its pretraining."""
    config = read_run_config(folder)
    if config.pretrain.steps:
        return run_model(folder, "pretrain", None).params
    if config.model != "embedded":
        return with_adapter(config, model_config, load_pretrained(config.model).params)
    from jaxalign.models.decoder import init_params

    return init_params(model_config, jax.random.key(config.seed))


def hugging_face_to_orbax(source: str, target: Path, dtype: Any) -> None:
    """Weights as an Orbax checkpoint `params` beside `model.json`."""
    import orbax.checkpoint as ocp

    model = load_pretrained(source, dtype=dtype)
    target.mkdir(parents=True)
    write_model_config(target, model.config)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((target / "params").absolute(), model.params)


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
