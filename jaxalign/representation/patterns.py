"""Activity patterns: differences of the hidden states of a response under opposite stimuli."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import Layout, states_at_layers
from jaxalign.models.responses import from_packed, packed_layout
from jaxalign.records import AnyArray, record
from jaxalign.representation.batches import StimulusBatch
from jaxalign.rows import PackedRows

States = Float[Array, "rows layers positions width"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reader of hidden states of a decoder at selected layers."""

    config: Any
    layers: tuple[int, ...]
    """As in `decoder.states_at_layers`."""
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        if not isinstance(self.config, DecoderConfig):
            raise UserError(
                "representation.steps: hidden states are read from decoders, and this model is an "
                "encoder-decoder; set --representation.steps 0"
            )

    def states(
        self,
        params: Mapping[str, Any],
        tokens: Int[Array, "rows length"],
        prompt_length: Int[Array, " rows"],
        positions: int,
        *,
        packed: PackedRows | None = None,
        lengths: Int[Array, " rows"] | None = None,
    ) -> States:
        """Float32 hidden states at the first tokens of each response.

        Args:
          params: of the decoder, with adapters where it has them.
          tokens: prompt and response, padded on the right.
          prompt_length: how many of `tokens` are prompt.
          positions: how many tokens of the response.
          packed: the same rows packed: the same states with less work.
          lengths: of the rows without padding; None: unknown, so that padding counts in the
            statistics of experts.
        """
        layout, read = None, prompt_length[:, None] + jnp.arange(positions)[None]
        read = jnp.minimum(read, tokens.shape[1] - 1)
        if lengths is not None:
            layout = Layout(real=jnp.arange(tokens.shape[1])[None] < lengths[:, None])
        if packed is not None:  # each scored token is the one after that which predicts it
            layout, read = packed_layout(packed, tokens.shape[1]), packed.scored_positions + 1
            tokens = packed.tokens
        states = states_at_layers(
            params,
            self.config,
            tokens,
            layout,
            layers=self.layers,
            positions=read,
            compute=Compute(remat=self.remat, dtype=self.dtype),
        )
        if packed is not None:
            of_tokens = jnp.moveaxis(states, 1, 2)
            of_tokens = of_tokens.reshape(-1, *of_tokens.shape[2:])
            states = jnp.moveaxis(from_packed(of_tokens, packed, positions), 2, 1)
        return states.astype(jnp.float32)

    def patterns(self, batch: StimulusBatch, models: Mapping[str, Any]) -> tuple[States, States]:
        """Hidden states of the same responses under the preferred and dispreferred stimulus.

        Args:
          batch: of one process or all.
          models: parameters of the models that read the stimuli, "positive" and "negative".
        """
        sides = []
        for side, name in enumerate(("positive", "negative")):
            tokens, prompt_length, packed = batch.tokens, batch.prompt_length, batch.packed
            if batch.stimuli is not None and batch.stimuli_prompt_length is not None:
                tokens = batch.stimuli[:, side]
                prompt_length = batch.stimuli_prompt_length[:, side]
                packed = None if batch.packed_stimuli is None else batch.packed_stimuli[side]
            rows = tokens, prompt_length, batch.mask.shape[1]
            sides.append(self.states(models[name], *rows, packed=packed))
        return sides[0], sides[1]


@record
class Patterns:
    """Hidden states of one batch of stimuli, on the host."""

    positive: Float[AnyArray, "rows layers positions width"]
    negative: Float[AnyArray, "rows layers positions width"]
    mask: Bool[AnyArray, "rows positions"]
    record_index: Int[AnyArray, " rows"]


def read_patterns(
    reader: Reader, models: Mapping[str, Any], batches: Iterable[StimulusBatch]
) -> Iterator[Patterns]:
    """Activity patterns batch by batch, with only one batch in memory.

    Args:
      reader: layers and computation.
      models: as in `Reader.patterns`.
      batches: on the host; rows of weight 0 are dropped.
    """

    @jax.jit
    def run(models: Mapping[str, Any], batch: StimulusBatch) -> tuple[States, States]:
        return reader.patterns(batch, models)

    for batch in batches:
        positive, negative = map(np.asarray, run(models, batch))
        real = np.asarray(batch.weight) > 0
        yield Patterns(
            positive=positive[real],
            negative=negative[real],
            mask=np.asarray(batch.mask)[real],
            record_index=np.asarray(batch.record_index)[real],
        )


@record
class PatternSummary:
    """Statistics of activity patterns over all tokens, by layer."""

    direction: Float64[np.ndarray, "layers width"]
    """The mean difference v of preferred and dispreferred states."""
    norm: Float64[np.ndarray, " layers"]
    """Mean Euclidean norm of a token's difference."""
    state_norm: Float64[np.ndarray, " layers"]
    """Mean norm of a token's preferred state."""
    coherence: Float64[np.ndarray, " layers"]
    """Squared norm of the mean difference over the mean squared norm: 1 if all differences are
    equal, about one over the number of tokens if they are unrelated."""
    tokens: int


def summarise(patterns: Iterable[Patterns]) -> PatternSummary:
    """Mean direction, norms and coherence of patterns.

    Raises:
      UserError: there is no token.
    """
    tokens, sums = 0, None
    for part in patterns:
        gap = np.asarray(part.positive, np.float64) - part.negative
        mask = part.mask[:, None, :, None]
        norms = np.linalg.norm(gap, axis=-1) * part.mask[:, None]
        of_states = np.linalg.norm(np.asarray(part.positive, np.float64), axis=-1)
        new = [
            np.sum(gap, axis=(0, 2), where=mask),
            norms.sum((0, 2)),
            (of_states * part.mask[:, None]).sum((0, 2)),
            np.square(norms).sum((0, 2)),
        ]
        sums = new if sums is None else [a + b for a, b in zip(sums, new, strict=True)]
        tokens += int(part.mask.sum())
    if sums is None or not tokens:
        raise UserError("patterns: there are no response tokens")
    direction, norm, of_states, squares = (total / tokens for total in sums)
    power = np.square(direction).sum(-1)
    return PatternSummary(
        direction=direction,
        norm=norm,
        state_norm=of_states,
        coherence=np.divide(power, squares, out=np.zeros_like(power), where=squares > 0),
        tokens=tokens,
    )


def pooled(
    patterns: Iterable[Patterns],
) -> tuple[Float64[np.ndarray, "rows layers width"], Float64[np.ndarray, "rows layers width"]]:
    """Preferred and dispreferred states, averaged over the tokens of each response."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for part in patterns:
        mask = part.mask[:, None, :, None]
        number = np.maximum(part.mask.sum(1), 1)[:, None, None]
        for side, states in zip(sides, (part.positive, part.negative), strict=True):
            side.append(np.sum(np.asarray(states, np.float64), axis=2, where=mask) / number)
    return np.concatenate(sides[0]), np.concatenate(sides[1])


def steering(
    direction: Float64[np.ndarray, "layers width"],
    layers: Sequence[int],
    *,
    strength: float,
    depth: int,
) -> Float[Array, "depth width"]:
    r"""Vectors to add to hidden states in sampling, which steer a model without changing weights.

    .. math:: h_l \leftarrow h_l + s \, \bar v_l, \quad l \in S

    Put into the parameters by `decoder.with_steering`; it acts at every position.

    Args:
      direction: mean difference of each layer, from `PatternSummary`.
      layers: indices of the hidden states; 0, the embeddings, cannot be steered.
      strength: s; 0 changes nothing.
      depth: number of blocks of the model.

    Raises:
      UserError: a layer is not the output of a block.

    References:
      Zou et al., 2023, arXiv:2310.01405, section 3.1.2 (linear combination).
    """
    if wrong := [layer for layer in layers if not 1 <= layer <= depth]:
        raise UserError(f"layers: {wrong[0]} is not the output of a block; steer at 1 to {depth}")
    added = np.zeros((depth, direction.shape[1]), np.float32)
    for layer, vector in zip(layers, direction, strict=True):
        added[layer - 1] = strength * vector
    return jnp.asarray(added)
