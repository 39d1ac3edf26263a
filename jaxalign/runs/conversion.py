"""Conversion between Hugging Face folders, Orbax folders and GGUF files."""

from pathlib import Path
from typing import Any

import jax

from jaxalign.data import load_tokenizer
from jaxalign.files import replacing, write_json
from jaxalign.models import load_pretrained, save_pretrained
from jaxalign.models.gguf import generation_fields
from jaxalign.sharding import make_mesh, parameter_shardings
from jaxalign.stages.models import as_model, read_model_config, write_model_config


def gguf_to_hugging_face(source: Path, target: Path, dtype: Any) -> None:
    """Convert a GGUF file to a Hugging Face folder with dequantised weights."""
    tokenizer, model = load_tokenizer(source), load_pretrained(source, dtype=dtype)
    with replacing(target) as scratch:
        save_pretrained(model, scratch, tokenizer=tokenizer)
        write_json(scratch / "generation_config.json", generation_fields(source))


def hugging_face_to_orbax(source: str, target: Path, dtype: Any) -> None:
    """Convert a Hugging Face model to an Orbax checkpoint `params` beside `model.json`."""
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
