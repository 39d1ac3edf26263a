"""Hugging Face folders in and out: safetensors streamed to and from the nested dict."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxalign.errors import UserError
from jaxalign.files import replacing, write_json, writing
from jaxalign.gguf import is_gguf
from jaxalign.models.families import FAMILIES
from jaxalign.models.families.mapping import Weight, check_numbers, transposed
from jaxalign.models.gguf import GGUFTensors, config_fields
from jaxalign.progress import busy

# Buffers that old checkpoints carry and no model needs.
HARMLESS = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|attention\.bias"
    r"|attention\.masked_bias)$"
)
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONFIG_FILES = ("config.json",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
FLOATING = ("F64", "F32", "F16", "BF16")
Rule = Callable[[str, tuple[int, ...]], PartitionSpec]
SCORE_TENSOR = "score.weight"
LOGGER = logging.getLogger(__name__)


def find_folder(path_or_hub_name: str | Path, files: Iterable[str] = HUB_FILES) -> Path:
    """The local folder of that name, or the hub's snapshot of it.

    Args:
      path_or_hub_name: "folder" or "org/name".
      files: patterns of what is wanted from the hub; by default safetensors, JSON and tokenizers.

    Raises:
      UserError: if there is neither.
    """
    path = Path(path_or_hub_name).expanduser()
    name = str(path_or_hub_name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{name}: no such folder here, and the hub did not give it ({reason}); "
            "give a local folder or check the name and the connection"
        ) from error


def exported(name: str | Path) -> str | Path:
    """The exported model of a run's folder; any other name as it is."""
    export = Path(name).expanduser() / "export"
    return export if export.is_dir() else name


def find_model(path_or_hub_name: str | Path, files: Iterable[str] = HUB_FILES) -> Path:
    """The GGUF file of that name, or the folder as `find_folder` finds it."""
    path = Path(path_or_hub_name).expanduser()
    return path if is_gguf(path) and not path.is_dir() else find_folder(path_or_hub_name, files)


def read_config(source: Path, name: str = "config.json") -> Any:
    """Our description of a model: from its folder's config file, or its GGUF file's metadata.

    Raises:
      UserError: if the file is missing or broken, or the family is not supported.
    """
    if is_gguf(source):
        return _config(source, json.dumps(config_fields(source)))
    file = source / name
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    except FileNotFoundError:
        found = next(iter(sorted(source.glob("*.gguf"))), None)
        hint = "" if found is None else f"; for the GGUF file there, name {found}"
        raise UserError(
            f"{file}: missing; a model folder has config.json and safetensors{hint}"
        ) from None
    return _config(file, text)


def _config(file: Path, text: str) -> Any:
    """The description in a config's text; the file is named in messages."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: a JSON object is expected")
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{file}: model_type: {family!r} is not supported; it has {known}")
    if fields.get("quantization_config"):
        raise UserError(f"{file}: quantization_config: quantised weights are not supported")
    try:
        check_numbers(fields)
        config = FAMILIES[family].config(fields)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config.json: ')}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}") from None
    return dataclasses.replace(config, source=text)


class TensorFiles:
    """The tensors of safetensors files, read one at a time.

    A file is opened for each read and closed after it: the pages of an open memory map count as
    the process's own memory, and would add the whole model once more.

    Args:
      files: to read from.
      weight_map: tensor -> the name of the file that holds it, from an index: copies elsewhere and
        tensors that are not listed are not read. None: every tensor is read.

    Raises:
      UserError: if a file cannot be read, or a tensor is not of floating-point numbers.
    """

    def __init__(self, files: Iterable[Path], weight_map: Mapping[str, str] | None = None):
        from safetensors import SafetensorError

        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with self._open(file) as opened:
                    for name in opened.keys():  # noqa: SIM118, it is no dict
                        if weight_map is not None and weight_map.get(name) != file.name:
                            continue
                        part = opened.get_slice(name)
                        kind = part.get_dtype()
                        if kind not in FLOATING and not HARMLESS.search(name):
                            raise UserError(
                                f"{file}: {name}: {kind} weights are not supported; save the "
                                "model in float32, float16 or bfloat16"
                            )
                        self.files[name] = file
                        self.shapes[name] = tuple(part.get_shape())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None

    def _open(self, file: Path) -> Any:
        from safetensors import safe_open

        return safe_open(file, framework="numpy")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or the part of it that `index` names, without reading the rest.

        Raises:
          UserError: if a value in it is not finite.
        """
        with self._open(self.files[name]) as opened:
            tensor = opened.get_slice(name)[index] if index else opened.get_tensor(name)
        if not _is_finite(tensor):
            raise UserError(
                f"{self.files[name]}: {name}: holds NaN or infinity; the file is damaged or the "
                "training that wrote it diverged"
            )
        return tensor


def _is_finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, by the bits: half the time of copying `x`."""
    infinity, size = np.array(np.inf, x.dtype), x.dtype.itemsize
    return all(
        x.view(kind).max(initial=0) < bound.view(kind)
        for kind, bound in ((f"i{size}", infinity), (f"u{size}", -infinity))
    )


def tensor_files(folder: Path) -> TensorFiles:
    """The tensors of a model folder: of its single file, or those that its index lists.

    Raises:
      UserError: if there are none, or index and files do not agree.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return TensorFiles([single])
    if index.is_file():
        listed = _weight_map(index)
        files = TensorFiles([folder / name for name in sorted(set(listed.values()))], listed)
        for name, file in listed.items():
            if name not in files.shapes:
                raise UserError(f"{index}: {name}: is not in {file}, where the index has it")
        return files
    pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if pickles:
        raise UserError(
            f"{folder}: only {pickles[0]} there; pickled weights can run code and are refused, "
            "convert them to model.safetensors"
        )
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of the file in the index's folder that holds it."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: broken index ({type(error).__name__}: {error})") from None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: weight_map: an object of tensor and file names is expected")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {name}: {file!r} is not the name of a file in the folder")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: {name}: names {file}, which is not in the folder")
    return listed


def load_pretrained(
    path_or_hub_name: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rule: Rule | None = None,
) -> Any:
    """A model from a Hugging Face folder, hub name or GGUF file, its weights streamed into place.

    Every leaf is read, converted and placed before the next one; with a mesh, each device's part
    is read from the files by itself. So the host never holds the model twice.

    Args:
      path_or_hub_name: folder with config.json and safetensors, a GGUF file, or a name such as
        "org/model".
      dtype: of the parameters; None keeps the file's own (float32 where it is quantised).
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
    files = GGUFTensors(folder) if is_gguf(folder) else tensor_files(folder)
    scored = SCORE_TENSOR in files.shapes
    config, renamed = _settle(files, config, folder, scored=scored)
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


def weight_table(config: Any, *, scored: bool) -> list[Weight]:
    """The family's tensors and our leaves; with a scalar head, its own for the unembedding's."""
    table: list[Weight] = FAMILIES[config.family].weights(config)
    if not scored:
        return table
    kept = [weight for weight in table if weight.paths != ("unembed/kernel",)]
    return [*kept, transposed(SCORE_TENSOR, "score/kernel")]


def model_class(config: Any, *, scored: bool = False) -> tuple[Any, dict[str, Any]]:
    """The class of the model that a config describes, and its parameters' shapes."""
    from jaxalign.models.config import DecoderConfig

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


def _layer_names(weight: Weight, leaves: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The file's names of a weight, one per layer where it has layers."""
    if not weight.per_layer:
        return [weight.name]
    return [weight.name.format(layer=i) for i in range(leaves[weight.paths[0]][0])]


def _sources(
    files: TensorFiles | GGUFTensors,
    table: Iterable[Weight],
    renamed: Mapping[str, str],
    leaves: Mapping[str, tuple[int, ...]],
    config: Any,
    folder: Path,
) -> dict[str, tuple[Weight, int, list[str]]]:
    """Per leaf: its weight, its number among the weight's leaves and the names to read.

    Checks on the way that the files hold exactly the tensors of this config, in its shapes.
    """
    sources: dict[str, tuple[Weight, int, list[str]]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for weight in table:
        names = _layer_names(weight, leaves)
        shapes = [leaves[path][1:] if weight.per_layer else leaves[path] for path in weight.paths]
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


def _settle(
    files: TensorFiles | GGUFTensors, config: Any, folder: Path, *, scored: bool
) -> tuple[Any, dict[str, str]]:
    """The config as the files have it, and the file's names of tensors where they are others.

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


def _equal(files: TensorFiles | GGUFTensors, name: str, other: str) -> bool:
    """Whether two tensors, [rows, width], are the same; some rows of each are held at a time."""
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


def _bare_names(files: TensorFiles | GGUFTensors, config: Any) -> dict[str, str]:
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
    """One leaf on its devices; each device's part is read, converted and placed by itself."""
    stored = files.read(names[0]).dtype if dtype is None else np.dtype(dtype)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if weight.transposed is None:
            return weight.split(files.read(name))[number][index]
        return files.read(name, index[::-1]).T if weight.transposed else files.read(name, index)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        index = tuple(slice(start, stop) for start, stop, _ in bounds)
        if not weight.per_layer:
            return np.ascontiguousarray(part(names[0], index).astype(stored, copy=False))
        out = np.empty([s.stop - s.start for s in index], stored)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            out[i] = part(names[layer], index[1:])
        return out

    return jax.make_array_from_callback(shape, sharding, read)


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_size: int = 5 * 1000**3,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config.json and safetensors that transformers opens; the reverse of loading.

    Tensors are taken from the devices layer by layer, and at most one shard is held at a time.

    Args:
      model: a `Decoder`, `EncoderDecoder` or `ScoreModel`, or anything with its `config` and
        `params`.
      folder: made if absent; weights that an earlier save left there are removed.
      tokenizer: written beside the model with its own `save_pretrained`, if given.
      dtype: of the file; None is the parameters' own.
      max_shard_size: bytes of one file; more tensors go into several files and an index.
      fields: more fields of config.json.

    Returns:
      The folder.
    """
    folder = Path(folder)
    params = dict(_leaf_items(model.params))
    shapes = {path: leaf.shape for path, leaf in params.items()}
    scored = "score/kernel" in shapes
    plan = _save_plan(weight_table(model.config, scored=scored), shapes)
    writer = jax.process_index() == 0
    target = np.dtype(dtype) if dtype is not None else np.dtype(next(iter(params.values())).dtype)

    def tensor(weight: Weight, layer: int | None) -> np.ndarray:
        parts = [to_host(params[path], layer) for path in weight.paths]
        joined = weight.join(*parts)
        kept = joined.dtype if dtype is None else target
        return np.ascontiguousarray(joined.astype(kept, copy=False))

    def nbytes(weight: Weight) -> int:
        items = [params[path] for path in weight.paths]
        sizes = [x.size // (x.shape[0] if weight.per_layer else 1) for x in items]
        return sum(sizes) * (items[0].dtype.itemsize if dtype is None else target.itemsize)

    shards: list[list[tuple[str, Weight, int | None]]] = [[]]
    filled = total = 0
    for entry in plan:
        size = nbytes(entry[1])
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled, total = filled + size, total + size
    if writer:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    files = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, entries in zip(files, shards, strict=True):
        tensors = {name: tensor(weight, layer) for name, weight, layer in entries}
        if writer:
            from safetensors.numpy import save_file

            with replacing(folder / file) as scratch:
                save_file(tensors, scratch, metadata={"format": "pt"})
    if writer:
        _remove_old_weights(folder, keep=files)
        if len(shards) > 1:
            where = {
                name: file
                for file, entries in zip(files, shards, strict=True)
                for name, _, _ in entries
            }
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(folder / "model.safetensors.index.json", index)
        written = hf_config(model.config, dtype=target, scored=scored) | dict(fields or {})
        write_json(folder / "config.json", written)
        if tokenizer is not None:
            with writing(folder):
                tokenizer.save_pretrained(folder)
    return folder


def hf_config(config: Any, *, dtype: Any, scored: bool = False) -> dict[str, Any]:
    """The `config.json` of a config: what it was read from, where it still says the same.

    Otherwise the family writes its fields anew, and those that do not shape the model (token
    ids) are kept. With a scalar head it is a sequence classifier of one label.
    """
    family, fields = FAMILIES[config.family], config.source_fields
    if not (fields and family.config(fields) == config):
        kept = {
            key: value
            for key, value in fields.items()
            if key not in ("rope_parameters", "layer_types")
        }
        fields = kept | family.hf_config(config)
    name = score_architecture(family) if scored else family.ARCHITECTURE
    fields |= {"model_type": config.family, "architectures": [name]}
    if scored:
        fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    fields.pop("torch_dtype", None)
    fields.pop("dtype", None)
    return fields | {"torch_dtype": np.dtype(dtype).name}


def score_architecture(family: ModuleType) -> str:
    """Transformers' class with a scalar head; the model below it where there is none."""
    usual = family.ARCHITECTURE.replace("ForCausalLM", "ForSequenceClassification")
    return getattr(family, "SCORE_ARCHITECTURE", usual)


def _leaf_items(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaf_items(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _save_plan(table, shapes) -> list[tuple[str, Weight, int | None]]:
    """Every tensor to write, in the order of layers."""
    outer: list[tuple[str, Weight, int | None]] = [
        (w.name, w, None) for w in table if not w.per_layer
    ]
    layered: list[tuple[str, Weight, int]] = [
        (name, w, layer)
        for w in table
        if w.per_layer
        for layer, name in enumerate(_layer_names(w, shapes))
    ]
    return [*outer, *sorted(layered, key=lambda entry: entry[2])]


def to_host(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, gathered from all devices and processes."""
    part = leaf if layer is None else leaf[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _remove_old_weights(folder: Path, *, keep: list[str]) -> None:
    """Weights of an earlier save, which loading would otherwise prefer or mix in."""
    pattern = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for file in folder.iterdir():
        if pattern.fullmatch(file.name) and file.name not in keep:
            file.unlink()
