"""The model of a run: architecture, initial weights, and `model.json` in the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import config as configs
from jaxalign.config import ArchitectureConfig, TrainConfig
from jaxalign.data import embedded_tokenizer, load_tokenizer
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError
from jaxalign.files import write_json
from jaxalign.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    decoder,
    encoder_decoder,
    load_pretrained,
)
from jaxalign.models.config import ModelConfig
from jaxalign.models.decoder import init_params
from jaxalign.models.folders import CONFIG_FILES, find_model, read_config
from jaxalign.models.lora import merge
from jaxalign.models.peft import load_adapters
from jaxalign.models.saving import hf_config, to_host
from jaxalign.models.score import SCORE, ScoreModel
from jaxalign.sharding import make_mesh, place

if TYPE_CHECKING:
    from jaxalign.stages.kind import RunContext


def stage_folder(folder: Path, name: str) -> Path:
    """Folder of a stage's checkpoints."""
    return folder / "checkpoints" / name


def write_model_config(folder: Path, model_config: ModelConfig) -> None:
    """Write the architecture to the run folder, in the form of Hugging Face's config.json."""
    if jax.process_index() == 0:
        write_json(folder / "model.json", hf_config(model_config, dtype=jnp.dtype("float32")))


def read_model_config(folder: Path) -> Any:
    """The architecture in a run folder.

    Raises:
      UserError: the file is missing or invalid.
    """
    return read_config(folder, "model.json")


def read_run_config(folder: Path) -> TrainConfig:
    """The config of a run folder.

    Raises:
      UserError: the folder is not a run folder.
    """
    path = folder / "config.json"
    if not path.is_file() or not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: not a run folder (config.json and checkpoints are missing)")
    return configs.read_config(path)


def embedded_config(shape: ArchitectureConfig, vocabulary: int) -> DecoderConfig:
    """The architecture of the decoder with random weights (`model` "embedded")."""
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


def as_model(model_config: ModelConfig, params: Any) -> Any:
    """The nnx module of an architecture with the given parameters."""
    kind: Any = Decoder if isinstance(model_config, DecoderConfig) else EncoderDecoder
    return (ScoreModel if SCORE in params else kind)(model_config, params)


def with_adapter(config: TrainConfig, model_config: ModelConfig, params: Any) -> Any:
    """The model's parameters, with the config's adapters merged in if there are any."""
    if config.adapter is None:
        return params
    adapters, scale, _ = load_adapters(config.adapter, model_config)
    return merge(params, adapters, scale)


def model_of(config: TrainConfig) -> Any:
    """The architecture of a run, without loading weights.

    Raises:
      UserError: there is no such model.
    """
    if config.model == "embedded":
        return embedded_config(config.architecture, vocabulary_of(config))
    try:
        return read_config(find_model(config.model, CONFIG_FILES))
    except UserError as error:
        raise UserError(
            f"model: {error}; a plan only needs its config.json: --model tpu/shapes/NAME"
        ) from None


def vocabulary_of(config: TrainConfig) -> int:
    """Vocabulary size of the embedded model; of a tokenizer to be trained, the largest size.

    Raises:
      UserError: there is no such tokenizer.
    """
    if config.tokenizer is not None:
        return len(load_tokenizer(config.tokenizer))
    return config.architecture.vocabulary if config.pretrain.text else len(embedded_tokenizer())


def home_of(config: TrainConfig, mesh: Mesh) -> Mesh:
    """Where a run keeps the model that its stages start from and leave.

    This is the mesh; or the CPU, if the devices store frozen weights in fewer bits and have no
    memory for them in float32.

    Raises:
      UserError: JAX has no CPU.
    """
    if config.lora.weights == "float32":
        return mesh
    try:
        return make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    except RuntimeError:
        raise UserError(
            f"lora.weights: {config.lora.weights} needs JAX's CPU beside the accelerator for the "
            "float32 weights; add ,cpu to JAX_PLATFORMS"
        ) from None


def keep(params: Any, home: Mesh) -> Any:
    """Copy parameters to the place where a run keeps its model, from the devices of a mesh."""
    local = set(home.devices.flat)

    def kept(leaf: Any) -> Any:
        is_there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == local
        return leaf if is_there else place(to_host(leaf), home)

    return jax.tree.map(kept, params)


def initial_model(config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Any, Any]:
    """The architecture and the initial float32 parameters, where the run keeps them (`home_of`).

    Raises:
      UserError: there is no such model, or adapters without a model.
    """
    if config.adapter is not None and config.model == "embedded":
        raise UserError("adapter: needs the model on which it was trained; set --model")
    home = home_of(config, mesh)
    if config.model != "embedded":
        model = load_pretrained(config.model, dtype=jnp.float32, mesh=home)
        params = with_adapter(config, model.config, model.params)
        return model.config, place(params, mesh) if home is mesh else keep(params, home)
    model_config = embedded_config(config.architecture, len(tokenizer))
    params = init_params(model_config, jax.random.key(config.seed))
    return model_config, place(params, home)


def load_like(context: "RunContext", field: str, folder: str) -> Any:
    """The parameters in a folder, which must have the run's architecture.

    Args:
      context: of the run.
      field: of the config, for the message.
      folder: of the model.

    Raises:
      UserError: the architecture is different.
    """
    loaded = load_pretrained(folder, dtype=jnp.float32, mesh=context.mesh)
    if not isinstance(loaded.config, DecoderConfig) or loaded.config != context.model_config:
        raise UserError(
            f"{field}: {folder} and {context.config.model} have different architectures; tune "
            "both from one model"
        )
    return place(loaded.params, context.mesh)


def parameter_structs(model_config: ModelConfig) -> Any:
    """Shapes and types of the parameters; nothing is computed."""
    module: Any = decoder if isinstance(model_config, DecoderConfig) else encoder_decoder
    return jax.eval_shape(lambda: module.init_params(model_config, jax.random.key(0)))
