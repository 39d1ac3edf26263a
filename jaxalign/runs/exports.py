"""Export of a run's model as a Hugging Face folder, at the end of a run and by `convert`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.config import TrainConfig
from jaxalign.data import load_tokenizer
from jaxalign.data.plain_prompts import with_choice
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.files import replacing, write_json, write_text
from jaxalign.gguf import is_gguf
from jaxalign.models import save_pretrained
from jaxalign.models.folders import find_model
from jaxalign.models.gguf import generation_fields
from jaxalign.models.score import ScoreModel
from jaxalign.runs.restore import run_model
from jaxalign.stages.models import read_run_config
from jaxalign.stages.prompts import prompts_of
from jaxalign.stages.scores import exported_fields

GENERATION = "generation_config.json"


def keep_generation_config(config: TrainConfig, folder: Path) -> None:
    """Copy the initial model's generation config to the run folder, if there is one.

    It lists the end-of-response tokens, which are often more than those in `config.json`.
    """
    if config.model == "embedded" or jax.process_index() != 0:
        return
    model = find_model(config.model)
    if is_gguf(model):
        write_json(folder / GENERATION, generation_fields(model))
    elif (file := model / GENERATION).is_file():
        write_text(folder / GENERATION, file.read_text(encoding="utf-8", errors="replace"))


def export_model(
    run: Path,
    config: TrainConfig,
    model: Any,
    target: Path,
    *,
    tokenizer: Tokenizer,
    step: int | None,
    dtype: Any = None,
) -> None:
    """Write a model of a run with its tokenizer and config.

    Args:
      run: folder of the run.
      config: of the run.
      model: as `save_pretrained` takes it.
      target: folder to write.
      tokenizer: of the run.
      step: of the preference stage, for a reward model's bias.
      dtype: of the weights; None: that of the parameters.
    """
    fields = None
    if isinstance(model, ScoreModel) and jax.process_index() == 0:
        fields = exported_fields(config, tokenizer, run, step)
    tokenizer = with_choice(tokenizer, prompts_of(config, tokenizer), end_token=config.end_token)
    save_pretrained(model, target, tokenizer=tokenizer, dtype=dtype, fields=fields)
    if jax.process_index() == 0 and (run / GENERATION).is_file():
        write_text(target / GENERATION, (run / GENERATION).read_text(encoding="utf-8"))


def export_run(
    folder: Path,
    target: Path,
    *,
    stage: str | None = None,
    step: int | None = None,
    dtype: Any = "float32",
) -> None:
    """Write the model of a run's checkpoint, in the same form as at the end of the run.

    Args:
      folder: of the run.
      target: folder to create.
      stage: of the run; None: the last.
      step: of the stage; None: the newest intact checkpoint.
      dtype: of the written weights.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    config, tokenizer = read_run_config(folder), load_tokenizer(folder / "tokenizer")
    model, step = run_model(folder, stage, step)
    with replacing(target) as scratch:
        export_model(
            folder, config, model, scratch, tokenizer=tokenizer, step=step, dtype=jnp.dtype(dtype)
        )
