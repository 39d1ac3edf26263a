"""The model of a run: architecture, adapters, mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from jaxalign.config.fields import AtLeastOne, BelowOne, Count, Parts, Positive, Range
from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """A Llama-like decoder with random weights, for runs without a named model."""

    width: AtLeastOne = 128
    """Width of the residual stream."""
    layers: AtLeastOne = 4
    """Number of blocks."""
    heads: AtLeastOne = 4
    """Query heads."""
    kv_heads: AtLeastOne = 4
    """Key and value heads."""
    mlp_width: AtLeastOne = 384
    """Inner width of the gated MLP."""
    context: Annotated[int, Range("[2, inf)")] = 256
    """Longest sequence."""
    vocabulary: Annotated[int, Range("[259, inf)")] = 4096
    """Size of the BPE vocabulary trained on the text, where no tokenizer is named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains all parameters instead."""

    rank: Count = 0
    """Rank of each adapter; 0: none."""
    alpha: Positive = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    """Probability that an input feature of an adapter is dropped in training."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Names of the matrices that get an adapter; patterns with * are allowed."""
    weights: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """How the devices store a decoder's frozen weights under the adapters. int8 and nf4 (QLoRA,
    arXiv:2305.14314) quantise the matrices of its layers, which are dequantised in their products;
    embeddings and head are stored in the `dtype` of the computation. The loaded weights stay in
    host memory, where the adapters are merged into them."""

    @property
    def scale(self) -> float:
        """The factor on an adapter's output."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh; the product of the sizes is the number of devices."""

    data: Parts = -1
    """Number of replicas; -1: all remaining devices."""
    fsdp: Parts = 1
    """Number of shards of parameters and optimiser state (ZeRO-3)."""
    expert: Parts = 1
    """Number of shards of the experts of a mixture; the batch and other parameters are split over
    them, too."""
    sequence: Parts = 1
    """Number of shards of each row's positions, for long rows; parameters are sharded over them,
    too."""
    tensor: Parts = 1
    """Number of shards of heads, MLP width and vocabulary."""


def check_architecture(shape: ArchitectureConfig) -> None:
    """Check the sizes that constrain each other.

    Raises:
      UserError: names the field.
    """
    if shape.width % shape.heads or shape.width // shape.heads % 2:
        raise UserError(
            f"architecture.width: {shape.width} is not an even multiple of architecture.heads: "
            f"{shape.heads}"
        )
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"architecture.heads: {shape.heads} is not a multiple of architecture.kv_heads: "
            f"{shape.kv_heads}"
        )


def check_lora(name: str, lora: LoraConfig) -> None:
    """Check that weights are stored in fewer bits only under adapters.

    Args:
      name: of the field, for messages.
      lora: its value.

    Raises:
      UserError: names the field.
    """
    if lora.weights != "float32" and not lora.rank:
        raise UserError(
            f"{name}.weights: {lora.weights} is for frozen weights under adapters; set "
            f"--{name}.rank, or float32"
        )


def check_mesh(name: str, sizes: Mapping[str, int]) -> None:
    """Check the axes of a mesh.

    Args:
      name: of the field, for messages.
      sizes: of the axes.

    Raises:
      UserError: an axis is unknown, or two take all remaining devices.
    """
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"{name}: only one axis may be -1 (all remaining devices)")
    if unknown := sorted(set(sizes) - set(axes)):
        raise UserError(f"{name}: no axis {', '.join(unknown)}; the axes are {', '.join(axes)}")
