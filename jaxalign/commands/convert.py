"""`jaxalign convert SOURCE TARGET`: run, Orbax folder or GGUF to Hugging Face, or that to Orbax."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
from tyro.conf import Positional, arg

from jaxalign.config import Count
from jaxalign.errors import UserError
from jaxalign.files import check_output, replacing
from jaxalign.flags import parse
from jaxalign.gguf import is_gguf
from jaxalign.models import save_pretrained
from jaxalign.runs.conversion import gguf_to_hugging_face, hugging_face_to_orbax, orbax_model
from jaxalign.runs.exports import export_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run folder, Orbax folder or GGUF file -> Hugging Face folder; Hugging Face -> Orbax folder.

    SOURCE decides which of them it is.
    """

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Model to convert: run folder, Orbax folder, GGUF file, Hugging Face folder or Hub name."""
    target: Positional[Annotated[Path, arg(metavar="TARGET")]]
    """Folder to create; it must not exist."""
    stage: (
        Literal["pretrain", "sft", "preference", "feedback", "online", "representation"] | None
    ) = None
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
