"""Weights of Hugging Face folders and GGUF files streamed into the nested dict."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxalign.errors import UserError
from jaxalign.gguf import is_gguf
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.expert_files import SeparateExperts, separate_experts
from jaxalign.models.families import FAMILIES
from jaxalign.models.families.mapping import Weight, transposed
from jaxalign.models.folders import find_model, read_config
from jaxalign.models.gguf import GGUFTensors
from jaxalign.models.multimodal import TextTensors, holds_language_model
from jaxalign.models.mxfp4 import UnpackedTensors, holds_packed
from jaxalign.models.tensor_files import HARMLESS, TensorFiles, tensor_files
from jaxalign.progress import busy

Rule = Callable[[str, tuple[int, ...]], PartitionSpec]
Files = TensorFiles | GGUFTensors | TextTensors | SeparateExperts | UnpackedTensors
SCORE_TENSOR = "score.weight"
LOGGER = logging.getLogger(__name__)


def load_pretrained(
    path_or_hub_name: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rule: Rule | None = None,
) -> Any:
    """A model from a Hugging Face folder, hub name or GGUF file, its weights streamed into place.

    Leaves are read, converted and placed one by one; with a mesh, each device reads its own part of
    the files. So the host never holds the model twice.

    Args:
      path_or_hub_name: folder with config.json and safetensors, a GGUF file, or a name such as
        "org/model".
      dtype: dtype of the parameters; None keeps the file's (float32 where it is quantised, bfloat16
        where that is exact: MXFP4).
      mesh: devices to place the parameters on; None is the default device.
      rule: path ("layers/q/kernel") and shape -> PartitionSpec; by default the largest axis that
        the mesh's "fsdp" axis divides is split over it.

    Returns:
      A `Decoder` or `EncoderDecoder`; a `ScoreModel` where the files hold a scalar head.

    Raises:
      UserError: if the folder, its config or its weights cannot be used; the message says why.
    """
    folder = find_model(path_or_hub_name)
    config = read_config(folder)
    files = _tensors(folder)
    if isinstance(config, DecoderConfig) and config.experts is not None:
        files = separate_experts(files, config)
    scored = SCORE_TENSOR in files.shapes
    config, renamed = _resolve_ties(files, config, folder, scored=scored)
    if scored and files.shapes[SCORE_TENSOR][:1] != (1,):
        labels = files.shapes[SCORE_TENSOR][:1]
        raise UserError(f"{folder}: {SCORE_TENSOR}: {sum(labels)} labels; a scalar head has one")
    make, shapes = model_class(config, scored=scored)
    leaves = flatten(shapes)
    table = weight_table(config, scored=scored)
    sources = _sources(files, table, renamed, leaves, config, folder)
    params: dict[str, Any] = {}
    with busy(f"loading the weights of {path_or_hub_name}"):
        for path, shape in leaves.items():
            sharding = _sharding(path, shape, mesh, rule)
            _set(params, path, _place(files, *sources[path], shape, dtype, sharding))
    return make(config, params)


def _tensors(source: Path) -> Files:
    """The tensors of a model's folder or GGUF file under the names of its family."""
    if is_gguf(source):
        return GGUFTensors(source)
    files = tensor_files(source)
    if holds_language_model(files):
        return TextTensors(files, source)
    return UnpackedTensors(files) if holds_packed(files) else files


def weight_table(config: ModelConfig, *, scored: bool) -> list[Weight]:
    """The family's tensors and our leaves; a scalar head takes the place of the unembedding."""
    table: list[Weight] = FAMILIES[config.family].weights(config)
    if not scored:
        return table
    kept = [weight for weight in table if weight.paths != ("unembed/kernel",)]
    return [*kept, transposed(SCORE_TENSOR, "score/kernel")]


def model_class(config: ModelConfig, *, scored: bool = False) -> tuple[Any, dict[str, Any]]:
    """The class of a config's model, and its parameters' shapes."""
    if scored:
        from jaxalign.models.score import ScoreModel, with_head

        shapes = model_class(config)[1]
        return ScoreModel, with_head(shapes, {"kernel": (config.width, 1)})
    if isinstance(config, DecoderConfig):
        from jaxalign.models.decoder import Decoder, parameter_shapes

        return Decoder, parameter_shapes(config)
    from jaxalign.models.encoder_decoder import EncoderDecoder, parameter_shapes

    return EncoderDecoder, parameter_shapes(config)


def flatten(shapes: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Path ("layers/q/kernel") -> shape of every leaf."""
    flat = {}
    for name, value in shapes.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def layer_names(weight: Weight, leaves: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The file's names of a weight: one per layer and expert, where it has these."""
    return [weight.name.format(**at) for at in stack_places(weight, leaves[weight.paths[0]])]


def stack_places(weight: Weight, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Layer and expert of each tensor of a weight whose leaves have this shape, in order."""
    sizes = zip(("layer", "expert"), shape[: weight.stacked], strict=False)
    places: list[dict[str, int]] = [{}]
    for name, size in sizes:
        places = [{**place, name: at} for place in places for at in range(size)]
    return places


def _sources(
    files: Files,
    table: Iterable[Weight],
    renamed: Mapping[str, str],
    leaves: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    folder: Path,
) -> dict[str, tuple[Weight, int, list[str]]]:
    """Per leaf: its weight, its number among the weight's leaves and the names to read.

    Also checks that the files hold exactly the tensors of this config, in its shapes.
    """
    sources: dict[str, tuple[Weight, int, list[str]]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for weight in table:
        names = layer_names(weight, leaves)
        shapes = [leaves[path][weight.stacked :] for path in weight.paths]
        shape = weight.join(*(np.empty(s, np.bool_) for s in shapes)).shape
        expected |= dict.fromkeys(names, shape)
        for number, path in enumerate(weight.paths):
            sources[path] = weight, number, [renamed.get(name, name) for name in names]
    present = {name: renamed.get(name, name) for name in expected}
    missing = [name for name in expected if present[name] not in files.shapes]
    if missing:
        raise UserError(f"{folder}: missing weights: {_some(missing)}")
    family = FAMILIES[config.family]
    idle = {*getattr(family, "COPIES", ()), *getattr(family, "UNUSED", ())}
    extra = set(files.shapes) - set(present.values()) - idle
    headless = config.tied or "score/kernel" in leaves
    tied = {"lm_head.weight", "embed_out.weight"} if headless else set()
    surplus = sorted(name for name in extra - tied if not HARMLESS.search(name))
    if surplus:
        raise UserError(f"{folder}: weights that a {config.family} does not have: {_some(surplus)}")
    for name, shape in expected.items():
        if files.shapes[present[name]] != shape:
            raise UserError(
                f"{folder}: {name}: shape {list(files.shapes[present[name]])}, but config.json "
                f"says {list(shape)}"
            )
    return sources


def _resolve_ties(
    files: Files, config: ModelConfig, folder: Path, *, scored: bool
) -> tuple[Any, dict[str, str]]:
    """The config as the files have it, and the file's names of tensors where these differ.

    Embedding and head are tied by transformers' rule: not where both are stored and differ, and
    where one of a tied pair is stored, it is both (`PreTrainedModel.tie_weights`, transformers 5).

    Raises:
      UserError: if there is no head, or an encoder or decoder has an embedding of its own.
    """
    family, renamed = FAMILIES[config.family], _bare_names(files, config)
    for name, alias in getattr(family, "ALIASES", {}).items():
        if name not in files.shapes:
            renamed[name] = alias
    names: dict[tuple[str, ...], str] = {
        weight.paths: weight.name
        for weight in family.weights(dataclasses.replace(config, tied=False))
    }
    embedding, head = names["embed/embedding",], names["unembed/kernel",]

    def stored(name: str) -> str:
        return renamed.get(name, name)

    copies = [name for name in getattr(family, "COPIES", ()) if name in files.shapes]
    if stored(embedding) not in files.shapes:
        others = [name for name in (*copies, stored(head)) if name in files.shapes]
        if others and (copies or config.tied):
            if stored(head) == stored(embedding):
                renamed[head] = others[0]
            renamed[embedding] = others[0]
    for name in copies:
        if not _equal(files, name, stored(embedding)):
            raise UserError(
                f"{folder}: {name} differs from {stored(embedding)}; separate embeddings are not "
                "supported"
            )
    if scored:
        return config, renamed
    if stored(head) not in files.shapes and not config.tied:
        raise UserError(
            f"{folder}: {head}: missing, and config.json does not tie it to the embedding; if the "
            "model shares them, set tie_word_embeddings to true there"
        )
    both = config.tied and stored(head) in files.shapes
    if both and not _equal(files, stored(embedding), stored(head)):
        config = dataclasses.replace(config, tied=False)
        if jax.process_index() == 0:
            LOGGER.warning(
                f"{folder}: config.json ties {embedding} and {head}, but the files hold both and "
                "they differ; they are not tied, as in transformers"
            )
    return config, renamed


def _equal(files: Files, name: str, other: str) -> bool:
    """Whether two tensors, [rows, width], are equal; compared some rows at a time."""
    shape = files.shapes[name]
    if name == other or shape != files.shapes[other] or len(shape) != 2:
        return shape == files.shapes[other]
    some = max(1, 2**24 // shape[1])
    for start in range(0, shape[0], some):
        rows = slice(start, min(start + some, shape[0])), slice(None)
        x, y = (files.read(one, rows).astype(np.float32) for one in (name, other))
        if not np.array_equal(x, y):
            return False
    return True


def _bare_names(files: Files, config: ModelConfig) -> dict[str, str]:
    """Names without their first part, for folders saved from the base model alone (GPT-2)."""
    table = FAMILIES[config.family].weights(dataclasses.replace(config, tied=True))
    prefixes = {weight.name.split(".")[0] + "." for weight in table}
    if any(name.startswith(tuple(prefixes)) for name in files.shapes):
        return {}
    names: dict[str, str] = {}
    for name in files.shapes:
        names |= {prefix + name: name for prefix in prefixes}
    return names


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh | None, rule: Rule | None) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    spec = rule(path, shape) if rule is not None else largest_axis(path, shape, mesh)
    return NamedSharding(mesh, spec)


def largest_axis(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits a leaf's largest divisible axis over "fsdp" (or over all, if there is no "fsdp")."""
    names = ("fsdp",) if "fsdp" in mesh.axis_names else tuple(mesh.axis_names)
    size = int(np.prod([mesh.shape[name] for name in names]))
    first = 1 if "layers" in path.split("/") else 0
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % size == 0]
    spec: list[Any] = [None] * len(shape)
    if axes and size > 1:
        spec[max(axes, key=lambda axis: shape[axis])] = names
    return PartitionSpec(*spec)


def _place(files, weight, number, names, shape, dtype, sharding) -> jax.Array:
    """One leaf on its devices, each of which reads and converts its own part."""
    stored = files.read(names[0]).dtype if dtype is None else np.dtype(dtype)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if weight.interleaved:
            *lead, last = index
            count = len(weight.paths)
            strided = slice(count * last.start + number, count * last.stop, count)
            return files.read(name, (*lead, strided))
        if weight.transposed is None:
            return weight.split(files.read(name))[number][index]
        return files.read(name, index[::-1]).T if weight.transposed else files.read(name, index)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        index = tuple(slice(start, stop) for start, stop, _ in bounds)
        lead, rest = index[: weight.stacked], index[weight.stacked :]
        if not lead:
            return np.ascontiguousarray(part(names[0], rest).astype(stored, copy=False))
        out = np.empty([s.stop - s.start for s in index], stored)
        for at in np.ndindex(out.shape[: len(lead)]):
            place = [s.start + i for s, i in zip(lead, at, strict=True)]
            out[at] = part(names[np.ravel_multi_index(place, shape[: len(lead)])], rest)
        return out

    return jax.make_array_from_callback(shape, sharding, read)
