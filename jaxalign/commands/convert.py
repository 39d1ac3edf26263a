"""`jaxalign convert SOURCE TARGET`: run, Orbax folder or GGUF to Hugging Face, or that to Orbax."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.commands.arguments import parser, within
from jaxalign.config import Count
from jaxalign.errors import UserError
from jaxalign.files import check_output, replacing, write_json
from jaxalign.gguf import is_gguf
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.runs.exports import export_run
from jaxalign.sharding import make_mesh, parameter_shardings
from jaxalign.stages import NAMES
from jaxalign.stages.models import (
    as_model,
    read_model_config,
    write_model_config,
)

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str]) -> int:
    """Convert; which way is read from what SOURCE is."""
    flags = parser(
        "convert",
        "Run folder, Orbax folder or GGUF file -> Hugging Face folder; "
        "Hugging Face -> Orbax folder.",
    )
    flags.add_argument(
        "source",
        help="what to convert: run folder, Orbax folder, GGUF file, Hugging Face folder or Hub "
        "name",
    )
    flags.add_argument("target", type=Path, help="folder to create; it must not exist")
    flags.add_argument("--stage", choices=NAMES, help="stage of a run folder (default: its last)")
    flags.add_argument(
        "--step", type=within(Count), help="step of a run folder (default: its newest checkpoint)"
    )
    flags.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="data type of the written weights"
    )
    given = flags.parse_args(arguments)
    if os.path.lexists(given.target):
        raise UserError(f"{given.target}: exists already; name a folder that does not")
    check_output(given.target, "TARGET")
    source, dtype = Path(given.source), jnp.dtype(given.dtype)
    if (source / "checkpoints").is_dir():
        export_run(source, given.target, stage=given.stage, step=given.step, dtype=dtype)
    elif (source / "params").is_dir():
        model = orbax_model(source)
        with replacing(given.target) as target:
            save_pretrained(model, target, dtype=dtype)
    elif is_gguf(source) and not source.is_dir():
        gguf_to_hugging_face(source, given.target, dtype)
    else:
        hugging_face_to_orbax(given.source, given.target, dtype)
    print(given.target)
    return 0


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
