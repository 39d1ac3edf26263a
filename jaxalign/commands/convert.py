"""`jaxalign convert SOURCE TARGET`: models between runs, Hugging Face, Orbax and GGUF."""

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
from jaxalign.runs.gguf_export import export_gguf

GGUF_FORMATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run folder, Orbax folder or GGUF file -> Hugging Face folder; Hugging Face -> Orbax folder.

    SOURCE decides which of them it is. A TARGET that ends in .gguf is a GGUF file of any of them.
    """

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Model to convert: run folder, Orbax folder, GGUF file, Hugging Face folder or Hub name."""
    target: Positional[Annotated[Path, arg(metavar="TARGET")]]
    """Folder to create, or GGUF file NAME.gguf; it must not exist."""
    stage: (
        Literal["pretrain", "sft", "preference", "feedback", "online", "representation"] | None
    ) = None
    """Stage of a run folder; None: its last."""
    step: Count | None = None
    """Step of a run folder; None: its newest checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16", "f32", "bf16", "f16", "q8_0"] = "float32"
    """Data type of the written weights; f32, bf16 and f16 are short for them, q8_0 is for GGUF."""


def main(arguments: Sequence[str]) -> int:
    """Convert; which way is read from what SOURCE is."""
    options = parse(Options, "convert", arguments)
    to_gguf = is_gguf(options.target)
    if os.path.lexists(options.target):
        kind = "file" if to_gguf else "folder"
        raise UserError(f"{options.target}: exists already; name a {kind} that does not")
    if options.dtype == "q8_0" and not to_gguf:
        raise UserError("--dtype: only GGUF files have q8_0; name a TARGET that ends in .gguf")
    check_output(options.target, "TARGET")
    source = Path(options.source)
    if not (source / "checkpoints").is_dir():
        for name in ("stage", "step"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name}: {source} is no run folder with checkpoints; leave it out"
                )
    if to_gguf:
        export_gguf(
            options.source,
            options.target,
            format=GGUF_FORMATS.get(options.dtype, options.dtype),
            stage=options.stage,
            step=options.step,
        )
    else:
        names = {short: name for name, short in GGUF_FORMATS.items()}
        _to_folder(options, source, jnp.dtype(names.get(options.dtype, options.dtype)))
    print(options.target)
    return 0


def _to_folder(options: Options, source: Path, dtype: jnp.dtype) -> None:
    """Write a Hugging Face or Orbax folder."""
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
