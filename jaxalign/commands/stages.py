"""The stages of a run and what they leave in its folder."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import config as configs
from jaxalign.config import ArchitectureConfig, LoraConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.files import write_json
from jaxalign.models import Decoder, DecoderConfig, EncoderDecoder
from jaxalign.models.lora import merge
from jaxalign.models.peft import load_adapters
from jaxalign.models.score import SCORE, ScoreModel, init_head, with_head
from jaxalign.models.weights import hf_config, read_config

STAGES = ("pretrain", "sft", "preference", "online", "representation")


def stage_folder(folder: Path, name: str) -> Path:
    """Where a stage's checkpoints lie."""
    return folder / "checkpoints" / name


def trained_stages(config: TrainConfig) -> list[str]:
    """The stages that a config runs, in order."""
    return [name for name in STAGES if getattr(config, name).runs]


def stage_adapters(config: TrainConfig, name: str) -> LoraConfig | None:
    """The adapters that a stage trains; None: it trains all parameters."""
    if name == "representation":
        return config.alignment.lora
    return config.lora if config.lora.rank and name != "pretrain" else None


def write_model_config(folder: Path, model_config: Any) -> None:
    """Keep the architecture in the run folder, as Hugging Face's config.json."""
    if jax.process_index() == 0:
        write_json(folder / "model.json", hf_config(model_config, dtype=jnp.dtype("float32")))


def read_model_config(folder: Path) -> Any:
    """The architecture that a run folder keeps.

    Raises:
      UserError: the file is missing or broken.
    """
    return read_config(folder, "model.json")


def read_run_config(folder: Path) -> TrainConfig:
    """The config of a run folder.

    Raises:
      UserError: it is not one.
    """
    path = folder / "config.json"
    if not path.is_file() or not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: not a run folder (config.json and checkpoints are missing)")
    return configs.read_config(path)


def embedded_config(shape: ArchitectureConfig, vocabulary: int) -> DecoderConfig:
    """The decoder that is made where no model is named."""
    return DecoderConfig(
        family="llama",
        vocab_size=vocabulary,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.width // shape.heads,
        mlp_width=shape.mlp_width,
        context_length=shape.context,
        tied=True,
    )


def as_model(model_config: Any, params: Any) -> Any:
    """The nnx module that holds parameters of an architecture."""
    kind: Any = Decoder if isinstance(model_config, DecoderConfig) else EncoderDecoder
    return (ScoreModel if SCORE in params else kind)(model_config, params)


def with_adapter(config: TrainConfig, model_config: Any, params: Any) -> Any:
    """The model's parameters with the config's adapters merged in, where it names any."""
    if config.adapter is None:
        return params
    adapters, scale, _ = load_adapters(config.adapter, model_config)
    return merge(params, adapters, scale)


def parameter_structs(model_config: Any, *, scored: bool = False) -> Any:
    """Shapes and types of the parameters (with a scalar head), nothing computed."""
    from jaxalign.models import decoder, encoder_decoder

    room: Any = decoder if isinstance(model_config, DecoderConfig) else encoder_decoder

    def init() -> Any:
        key = jax.random.key(0)
        params = room.init_params(model_config, key)
        return with_head(params, init_head(model_config.width, key)) if scored else params

    return jax.eval_shape(init)
