"""Steering vectors: small files, added to the residual stream of one layer."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxalign.errors import UserError
from jaxalign.files import replacing
from jaxalign.models.config import DecoderConfig
from jaxalign.models.decoder import with_nulling, with_steering
from jaxalign.models.tensor_files import TensorFiles

FORMAT = "jaxalign steering vector"
TENSOR = "vector"
Factor = float | Literal["null"]
"""What multiplies a vector that is added; null: states lose what they have along it."""


@dataclass(frozen=True, kw_only=True)
class SteeringVector:
    """A direction in the residual stream."""

    layer: int
    """Index of the hidden state: l is the output of block l - 1, as in `decoder.states_at_layers`;
    0, the embeddings, cannot be steered."""
    vector: Float32[np.ndarray, " width"]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, for readers; no code reads it."""

    @property
    def norm(self) -> float:
        """Euclidean norm."""
        return float(np.linalg.norm(self.vector))

    @property
    def identity(self) -> str:
        """Text that changes with the vector and its layer."""
        return f"{hashlib.sha256(self.vector.tobytes()).hexdigest()[:16]}@{self.layer}"

    def by_layer(self, config: Any, factor: float = 1.0) -> Float[Array, "layers width"]:
        r"""The vector at its layer and zeros at the others, times a factor.

        Args:
          config: of the decoder that is steered.
          factor: multiplies the vector.

        Raises:
          UserError: the model is not a decoder with this layer and width.
        """
        if not isinstance(config, DecoderConfig):
            raise UserError("steering: only decoders are steered, and this is an encoder-decoder")
        if not 1 <= self.layer <= config.layers:
            raise UserError(
                f"steering: layer {self.layer}; the model's blocks end in layers 1 to "
                f"{config.layers}"
            )
        if self.vector.shape != (config.width,):
            raise UserError(
                f"steering: the vector has {len(self.vector)} numbers, and the model a width of "
                f"{config.width}; it was made for another model"
            )
        rows = np.zeros((config.layers, config.width), np.float32)
        rows[self.layer - 1] = factor * self.vector
        return jnp.asarray(rows)


def steered(
    params: Mapping[str, Any], config: Any, steering: SteeringVector, factor: Factor = 1.0
) -> Mapping[str, Any]:
    r"""A decoder's parameters, steered at every position: prompt, response and special tokens.

    .. math:: h_l \leftarrow h_l + \alpha v \quad\text{or}\quad
              h_l \leftarrow h_l - \frac{\max(h_l^\top v, 0)}{\lVert v \rVert^2} v

    Args:
      params: of the decoder; a vector that it has is replaced.
      config: of the decoder.
      steering: vector v and layer l.
      factor: alpha, or "null" for the second form; 0 changes nothing.

    Raises:
      UserError: the vector does not fit the model.
    """
    if factor == "null":
        return with_nulling(params, steering.by_layer(config))
    return with_steering(params, steering.by_layer(config, factor))


def write_steering(steering: SteeringVector, path: Path) -> None:
    """Write a vector as a safetensors file, with layer, norm and origin in its metadata."""
    from safetensors.numpy import save_file

    metadata = {
        "format": FORMAT,
        "layer": str(steering.layer),
        "norm": repr(steering.norm),
        "provenance": json.dumps(dict(steering.provenance), ensure_ascii=False),
    }
    tensors = {TENSOR: np.ascontiguousarray(steering.vector, np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata=metadata)


def read_steering(path: Path) -> SteeringVector:
    """Read a vector that `write_steering` has written.

    Raises:
      UserError: there is no such file, or it is not a steering vector.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `jaxalign steer` makes one")
    files = TensorFiles([path])
    with safe_open(path, framework="numpy") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != FORMAT or len(files.shapes.get(TENSOR, ())) != 1:
        raise UserError(f"{path}: not a steering vector of `jaxalign steer`")
    return SteeringVector(
        layer=int(metadata["layer"]),
        vector=files.read(TENSOR).astype(np.float32),
        provenance=json.loads(metadata["provenance"]),
    )


def parse_steering(text: str) -> tuple[SteeringVector, Factor]:
    """The vector and the factor of FILE, FILE:FACTOR or FILE:null.

    Args:
      text: path of a file of `write_steering`, and a factor; without one, 1.

    Raises:
      UserError: the file or the factor cannot be used.
    """
    name, colon, last = text.rpartition(":")
    if not colon or Path(text).is_file():
        return read_steering(Path(text)), 1.0
    if last == "null":
        return read_steering(Path(name)), "null"
    try:
        factor = float(last)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UserError(f"steer: {last!r} is not a factor; write FILE, FILE:2.5 or FILE:null")
    return read_steering(Path(name)), factor
