"""Weights in the form in which a decoding loop reads them, made once before the loop."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.models import cached_decoder, decoder, devices
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.int8 import Int8Matrix, quantise, with_int8_kernels
from jaxalign.records import record


@record
class DecodingWeights:
    """A policy's weights; a decoding loop reads each of them once per token and copies none.

    Attributes:
      params: the parameters' tree.
      layers: one tree for each layer of the decoder on a CPU, where a slice of stacked layers is a
        copy; None: the loop reads the stacked ones, of which an accelerator keeps no second copy.
      kernel: from hidden states to logits.
      bias: of the logits; None: there is none.
    """

    params: Mapping[str, Any]
    layers: list[Any] | None
    kernel: Float[Array, "width vocabulary"] | Int8Matrix
    bias: Float[Array, " vocabulary"] | None


def prepare(
    params: Mapping[str, Any],
    config: ModelConfig,
    dtype: Any = None,
    *,
    in_int8: bool = False,
) -> DecodingWeights:
    """The weights of a policy for decoding; a pure function, compiled or not.

    Args:
      params: parameters, with adapters or steering where wanted.
      config: the architecture.
      dtype: of the computation, to which the matrices are cast; None: that of the parameters.
      in_int8: whether a decoder's matrices are rounded (`models.int8`). Prompts are then read by
        the same rounded network, and all log-probs are that network's: they are not those of
        `params`, which a ratio of policies or a loss needs.

    Raises:
      UserError: int8 weights of an encoder-decoder or a mixture of experts.
    """
    if in_int8:
        return _in_int8(params, config)
    cast = params if dtype is None else _with_kernels_in(params, dtype)
    kernel, bias = decoder.unembedding(cast, config)
    kernel = kernel if dtype is None else kernel.astype(dtype)
    if devices.platform() != "cpu":
        return DecodingWeights(params=cast, layers=None, kernel=kernel, bias=bias)
    if isinstance(config, DecoderConfig):
        layers = cached_decoder.layers_of(cast["layers"], config.layers)
    else:
        layers = cached_decoder.layers_of(cast["decoder"]["layers"], config.decoder_layers)
    # the prompts' pass casts one layer at a time: a second cast stack would take memory
    return DecodingWeights(params=params, layers=layers, kernel=kernel, bias=bias)


def _in_int8(params: Mapping[str, Any], config: ModelConfig) -> DecodingWeights:
    """A decoder's weights with matrices in int8; the table of embeddings stays as it is."""
    if not isinstance(config, DecoderConfig):
        raise UserError("weights: int8 is for decoders; an encoder-decoder needs float")
    if config.experts is not None:
        raise UserError("weights: int8 is not implemented for mixtures of experts; use float")
    kernel, bias = decoder.unembedding(params, config)
    rounded = {**params, "layers": with_int8_kernels(params["layers"])}
    on_cpu = devices.platform() == "cpu"
    layers = cached_decoder.layers_of(rounded["layers"], config.layers) if on_cpu else None
    return DecodingWeights(params=rounded, layers=layers, kernel=quantise(kernel), bias=bias)


def _with_kernels_in(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The tree with its matrices in another dtype; norms and biases stay as they are."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if getattr(path[-1], "key", None) == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
