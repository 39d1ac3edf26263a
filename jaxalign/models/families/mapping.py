"""Parts that all family files share: entries of a weight table, and fields of a config."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig, Rope

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HF_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
ROPE_NUMBERS = (
    "factor",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model"),
    *("intermediate_size", "n_inner", "d_ff"),
    *("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"),
    *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim", "d_kv"),
    *("max_position_embeddings", "n_positions", "original_max_position_embeddings"),
    *("sliding_window", "sliding_window_pattern", "_sliding_window_pattern"),
    *("num_experts", "moe_intermediate_size"),
    *("decoder_sparse_step",),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
COUNTS = ("num_local_experts", "num_experts_per_tok")  # 0 in a dense Granite 4
POSITIVE = (
    *("rope_theta", "rotary_emb_base", "rope_local_base_freq", "rotary_pct"),
    *("partial_rotary_factor", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *("factor", "attention_factor", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "short_factor", "long_factor"),
    *("swiglu_alpha", "swiglu_limit"),
)
NOT_NEGATIVE = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("initializer_range", "initializer_factor", "max_window_layers"),
    *("router_aux_loss_coef", "router_jitter_noise"),
)
SWITCHES = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    *("norm_topk_prob",),
    *("use_parallel_residual", "scale_attn_weights", "scale_decoder_outputs"),
)
NULLABLE = (  # for which transformers derives a number
    *("n_inner", "num_decoder_layers", "num_key_value_heads", "head_dim", "sliding_window"),
    *("original_max_position_embeddings", "sliding_window_pattern", "_sliding_window_pattern"),
    *("max_window_layers", "tie_word_embeddings"),
)


def check_numbers(hf: Mapping[str, Any]) -> None:
    """Refuses sizes that are not positive integers and numbers out of their range, by field.

    Args:
      hf: a config.json; fields that are absent have the family's defaults.

    Raises:
      UserError: the first such field; also a number anywhere that is not finite.
    """

    def check(field: str, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                check(f"{field}.{key}", key, inner)
        elif isinstance(value, list):
            for at, inner in enumerate(value):
                check(f"{field}[{at}]", name, inner)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field}: {value} is not a finite number")
        elif value is None and name in NULLABLE + POSITIVE:
            return
        elif name in SIZES and (type(value) is not int or value < 1):
            raise UserError(f"{field}: {value!r} is not a positive integer")
        elif name in COUNTS and (type(value) is not int or value < 0):
            raise UserError(f"{field}: {value!r} is not an integer of 0 or more")
        elif name in SWITCHES and type(value) is not bool:
            raise UserError(f"{field}: {value!r} is not true or false")
        elif name in POSITIVE and not _number(value) > 0:
            raise UserError(f"{field}: {value!r} is not a positive number")
        elif name in NOT_NEGATIVE and not _number(value) >= 0:
            raise UserError(f"{field}: {value!r} is not a number of 0 or more")
        elif name in ("rope_scaling", "rope_parameters") and value is not None:
            raise UserError(f"{field}: {value!r} is not an object")

    unread = ("sliding_window",) if hf.get("use_sliding_window") is False else ()
    for field, value in hf.items():
        if field not in unread:
            check(field, field, value)


def _number(value: object) -> float:
    """The value as a float; NaN, which fails every comparison, if it is not a number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def head_width(hf: Mapping[str, Any], *, width: str, heads: str) -> int:
    """The width of a head, where the heads divide the model's.

    Args:
      hf: the config.
      width: field of the model's width.
      heads: field of the number of heads.
    """
    if hf[width] % hf[heads]:
        raise UserError(f"{heads}: {hf[heads]} does not divide {width} {hf[width]}")
    return hf[width] // hf[heads]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One Hugging Face tensor and the leaves of ours that it holds.

    Attributes:
      name: its name in the file; "{layer}" stands for the layer's number, "{expert}" for the
        expert's.
      paths: our leaves, such as "layers/q/kernel"; several where the file fuses them.
      split: the file's tensor -> one array per path (one layer's and one expert's, without these
        axes).
      join: the reverse.
      transposed: whether the single leaf is the plain transpose; lets slices be read alone.
      interleaved: whether the leaves' last axes alternate in the file's; lets slices be read, too.
    """

    name: str
    paths: tuple[str, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]
    transposed: bool | None = None
    interleaved: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor for every layer."""
        return "{layer}" in self.name

    @property
    def stacked(self) -> int:
        """How many leading axes of ours, layers and experts, the file has as separate tensors."""
        return self.per_layer + ("{expert}" in self.name)


def same(name: str, path: str) -> Weight:
    """A tensor stored as we hold it."""
    return Weight(
        name=name, paths=(path,), split=lambda x: (x,), join=lambda x: x, transposed=False
    )


def transposed(name: str, path: str) -> Weight:
    """A `torch.nn.Linear` weight, [outputs, inputs]."""
    return Weight(
        name=name, paths=(path,), split=lambda x: (x.T,), join=lambda x: x.T, transposed=True
    )


def linear(name: str, path: str, *, bias: bool) -> list[Weight]:
    """A `torch.nn.Linear`: the transposed weight, and the bias where there is one."""
    kernel = transposed(f"{name}.weight", f"{path}/kernel")
    return [kernel, same(f"{name}.bias", f"{path}/bias")] if bias else [kernel]


def fused(name: str, paths: tuple[str, ...], sizes: tuple[int, ...], *, axis: int) -> Weight:
    """Several leaves concatenated along the file's output axis.

    Args:
      name: the tensor's name.
      paths: our leaves.
      sizes: how much of the axis each leaf takes.
      axis: 0 for a `torch.nn.Linear` weight, which is transposed too; -1 for vectors and GPT-2's
        `Conv1D`, which are not.
    """
    ends = np.cumsum(sizes)[:-1]

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.split(x, ends, axis=axis)
        return tuple(part.T for part in parts) if axis == 0 else tuple(parts)

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([p.T for p in parts] if axis == 0 else list(parts), axis=axis)

    return Weight(name=name, paths=paths, split=split, join=join)


def interleaved(name: str, paths: tuple[str, ...]) -> Weight:
    """Several leaves whose last axes alternate: the first entry of each, then the second.

    Args:
      name: the tensor's name.
      paths: our leaves, all of one shape.
    """

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(x[..., first :: len(paths)] for first in range(len(paths)))

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)

    return Weight(name=name, paths=paths, split=split, join=join, interleaved=True)


def activation(hf: Mapping[str, Any], field: str) -> str:
    """Our name of the activation that a config names in `field`."""
    if hf[field] not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise UserError(f"config.json: {field}: {hf[field]!r} is not supported; it has {known}")
    return ACTIVATION_NAMES[hf[field]]


def refuse(hf: Mapping[str, Any], field: str, *, unless: Any) -> None:
    """Refuses a setting that is not supported."""
    if hf.get(field, unless) != unless:
        raise UserError(f"config.json: {field}: {hf[field]!r} is not supported, only {unless!r} is")


def given(hf: Mapping[str, Any], field: str, otherwise: Any) -> Any:
    """The field's value; `otherwise` where it is absent or null."""
    value = hf.get(field)
    return otherwise if value is None else value


def number(value: Any) -> float | None:
    """JSON writes whole floats as integers; None stays None."""
    return None if value is None else float(value)


def rope(
    hf: Mapping[str, Any],
    parameters: Mapping[str, Any] | None,
    *,
    theta: float,
    rotated: float = 1.0,
    interleaved: bool = False,
) -> Rope:
    """Rotary positions from a config's `rope_parameters` (new form) or `rope_scaling` (old).

    Args:
      hf: the whole config, for the context length.
      parameters: the dict of the variant, or None for the plain one.
      theta: base, where `parameters` has none.
      rotated: rotated fraction of a head, where `parameters` has none.
      interleaved: as in `Rope`.
    """
    fields = dict(parameters or {})
    kind = fields.get("rope_type", fields.get("type", "default"))
    context = given(fields, "original_max_position_embeddings", hf["max_position_embeddings"])
    # Phi-3 keeps the pretraining length beside the variant's dict, and transformers prefers it.
    context = given(hf, "original_max_position_embeddings", context)

    def numbers(field: str) -> tuple[float, ...] | None:
        values = fields.get(field)
        return None if values is None else tuple(float(x) for x in values)

    scalars = {name: number(fields.get(name)) for name in ROPE_NUMBERS}
    return Rope(
        theta=float(given(fields, "rope_theta", theta)),
        kind=kind,
        rotated=float(given(fields, "partial_rotary_factor", rotated)),
        interleaved=interleaved,
        original_context=context if kind in ("llama3", "yarn", "longrope") else None,
        truncate=bool(given(fields, "truncate", True)),
        short_factor=numbers("short_factor"),
        long_factor=numbers("long_factor"),
        **scalars,
    )


def rope_scaling(rope: Rope) -> dict[str, Any] | None:
    """The variant's dict in the old form, which every version of transformers reads."""
    if rope.kind == "default":
        return None
    names = {"original_context": "original_max_position_embeddings"}
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if (
            field.name in ("theta", "kind", "rotated", "interleaved")
            or value is None
            or value is True
        ):
            continue
        value = list(value) if isinstance(value, tuple) else value
        scaling[names.get(field.name, field.name)] = value
    return scaling


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The variant's dict in the new form, with its base inside."""
    return {"rope_type": "default", "rope_theta": rope.theta} | (rope_scaling(rope) or {})


def ropes_of_kinds(
    hf: Mapping[str, Any], *, theta: float, local_theta: float
) -> tuple[Rope, Rope | None]:
    """Rotary positions of full layers and, where they differ, of windowed ones.

    The old form's `rope_scaling` belongs to the full layers; the new form has one dict for each.

    Args:
      hf: the config.
      theta: base of the full layers, where the config has none for them.
      local_theta: base of the windowed layers, where the config has none for them.
    """
    nested = given(hf, "rope_parameters", {})
    full = rope(
        hf, (nested.get("full_attention") or {}) | given(hf, "rope_scaling", {}), theta=theta
    )
    local = rope(hf, nested.get("sliding_attention") or {}, theta=local_theta)
    return full, None if local == full else local


def windowed(hf: Mapping[str, Any], otherwise: list[bool]) -> tuple[bool, ...]:
    """Per layer, whether it sees a window: by `layer_types`, else by the family's pattern."""
    types = hf.get("layer_types")
    if types is not None:
        for kind in types:
            if kind not in ("sliding_attention", "full_attention"):
                raise UserError(f"config.json: layer_types: {kind!r} is not supported")
        if len(types) != len(otherwise):
            raise UserError(
                f"config.json: layer_types: {len(types)} entries for {len(otherwise)} layers"
            )
        otherwise = [kind == "sliding_attention" for kind in types]
    return tuple(otherwise) if any(otherwise) else ()


def hf_ropes_of_kinds(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `ropes_of_kinds`, in the new form, which every field fits."""
    kinds = {"full_attention": config.rope, "sliding_attention": config.local_rope or config.rope}
    return {"rope_parameters": {name: rope_parameters(one) for name, one in kinds.items()}}


def layer_types(config: Any) -> list[str]:
    """The reverse of `windowed`."""
    local = config.windowed or (False,) * config.layers
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]
