"""Steering vectors of one layer: the difference of means, and RePS, trained by preferences."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float64, Int

from jaxalign.data import PairBatch, TokenizedPairs, pair_batches
from jaxalign.data.tokenized import TokenizedExamples, check_whole_responses
from jaxalign.errors import UserError
from jaxalign.models.compute import Compute
from jaxalign.models.config import DecoderConfig
from jaxalign.models.decoder import with_nulling, with_steering
from jaxalign.models.responses import response_log_probs
from jaxalign.models.steering import SteeringVector
from jaxalign.representation.patterns import Reader

Negative = Literal["null", "subtract"]
Params = Mapping[str, Any]
LogProbs = Float[Array, "pairs 2"]
"""Sums over the tokens of chosen and rejected responses, in nats."""


def response_means(
    reader: Reader, params: Params, examples: TokenizedExamples, *, batch_size: int = 8
) -> Float64[np.ndarray, "examples sides layers width"]:
    r"""Mean hidden states of responses over their tokens, the end of the sequence included.

    .. math:: \bar h_l(x, y) = \frac{1}{|y|} \sum_t h_l(x, y_{\le t})

    Args:
      reader: layers.
      params: of the decoder.
      examples: pairs or single responses, in whose order the rows are.
      batch_size: number of examples in a batch.

    Raises:
      UserError: a response has turns of others between.
    """
    check_whole_responses(examples.rows, "representations")

    @jax.jit
    def run(params: Params, batch: PairBatch) -> Float[Array, "rows layers width"]:
        rows = batch.rows()
        states = reader.states(
            params, rows.tokens, rows.prompt_length, rows.response_tokens.shape[1]
        )
        real = jnp.arange(states.shape[2])[None] < rows.response_length[:, None]
        total = jnp.sum(states, axis=2, where=real[:, None, :, None])
        return total / jnp.maximum(rows.response_length, 1)[:, None, None]

    parts = []
    size = min(batch_size, len(examples))
    order: dict[str, Any] = {"epochs": 1, "shuffle": False, "buckets": 2}
    for batch in pair_batches(examples, batch_size=size, **order):
        means = np.asarray(run(params, jax.tree.map(jnp.asarray, batch)), np.float64)
        means = means.reshape(-1, examples.sides, *means.shape[1:])
        parts.append(means[np.asarray(batch.weight) > 0])
    return np.concatenate(parts)


def means_difference(means: Float64[np.ndarray, "pairs 2 width"], layer: int) -> SteeringVector:
    r"""The untrained vector: mean states of chosen minus those of rejected responses.

    .. math:: v = \frac1n \sum_i \bar h(x_i, y_i^w) - \bar h(x_i, y_i^l)

    Every response counts the same, however long.

    Args:
      means: from `response_means`, of the layer.
      layer: index of the hidden state.

    References:
      Rimsky et al., 2023, arXiv:2312.06681 (with the last token in place of the mean); the baseline
      DiffMean of Wu et al., 2025, arXiv:2501.17148.
    """
    vector = (means[:, 0] - means[:, 1]).mean(0).astype(np.float32)
    return SteeringVector(
        layer=layer, vector=vector, provenance={"method": "means", "pairs": len(means)}
    )


def reps_loss(
    steered: LogProbs, negative: LogProbs, plain: LogProbs, lengths: Int[Array, "pairs 2"]
) -> Float[Array, " pairs"]:
    r"""Reference-free preference steering: a margin in either direction, as in SimPO.

    .. math:: \Delta^+ &= \frac{\beta^+}{|y_w|} \log p_{+}(y_w \mid x)
                          - \frac{1}{|y_l|} \log p_{+}(y_l \mid x), &
              \beta^+ &= \max(\log p(y_l \mid x) - \log p(y_w \mid x), 1) \\
              \Delta^- &= \frac{\beta^-}{|y_l|} \log p_{-}(y_l \mid x)
                          - \frac{1}{|y_w|} \log p_{-}(y_w \mid x), &
              \beta^- &= \max(\log p(y_w \mid x) - \log p(y_l \mid x), 1) \\
              \ell &= -\log \sigma(\Delta^+) - \log \sigma(\Delta^-)

    p is the model itself, p+ with the vector added, p- with the vector's direction removed. The
    paper's responses are a steered one (chosen) and the model's own (rejected).

    Args:
      steered: log-probs under p+.
      negative: log-probs under p-.
      plain: log-probs under p, through which no gradient flows.
      lengths: tokens of the responses.

    References:
      Wu et al., 2025, arXiv:2505.20809, section 3: both margins and both weights. That the weights
      are of sums of log-probs, not of means, is its released code's.
    """
    own = jax.lax.stop_gradient(plain)
    gap = own[:, 0] - own[:, 1]
    up, down = jnp.maximum(-gap, 1.0), jnp.maximum(gap, 1.0)
    on, off = steered / lengths, negative / lengths
    added = up * on[:, 0] - on[:, 1]
    removed = down * off[:, 1] - off[:, 0]
    return -jax.nn.log_sigmoid(added) - jax.nn.log_sigmoid(removed)


@dataclass(frozen=True, kw_only=True)
class RepsOptions:
    """Training of a vector by `reps_loss`."""

    steps: int = 100
    """Number of updates."""
    batch_size: int = 8
    """Number of pairs in a batch."""
    learning_rate: float = 0.1
    """Peak length of a step of Adam, in units of the vector's first length; it falls linearly to 0.
    Ours: the released code has 0.04 for each of the 2,304 numbers of a vector of unit length."""
    factors: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor by which the vector is multiplied in training, drawn uniformly
    for each pair."""
    negative: Negative = "null"
    """The negative side: the direction is removed (null, the paper's), or the vector is subtracted
    with a factor (subtract)."""
    start: Literal["random", "means"] = "random"
    """The first vector: a random direction, or that of the difference of means."""
    seed: int = 0
    """Seed of the direction, the batches and the factors."""


def train_vector(
    params: Params,
    config: DecoderConfig,
    pairs: TokenizedPairs,
    first: SteeringVector,
    options: RepsOptions | None = None,
    *,
    compute: Compute = Compute(),
    watch: Callable[[int, float], None] | None = None,
) -> tuple[SteeringVector, list[float]]:
    r"""A steering vector that minimises `reps_loss`; the model stays as it is.

    The vector is added to the residual stream after the layer, at every position. From the paper:
    the loss, one vector for all factors, a factor drawn for each pair (from 2, 4, ..., 20, for
    vectors of unit length at first), and removal as the negative side. Recalled, not checked
    against the paper: the form of the removal (`models.decoder_layer.without_direction`).
    Ours: factors from a range; a factor of 1 begins with the norm of the difference of means, so
    that the same factors suit every model and layer; and the responses of any pairs.

    Args:
      params: of the decoder; they get no gradient.
      config: of the decoder.
      pairs: chosen responses are to become likelier where the vector is added.
      first: the difference of means: its layer, and its norm as the scale.
      options: of the training.
      compute: precision and memory.
      watch: called with (step, loss) after every update.

    Returns:
      The vector, and the loss of each step before its update.

    Raises:
      UserError: the difference of means is zero, or the loss is not finite.
    """
    options = options or RepsOptions()
    if not first.norm > 0:
        raise UserError("steering: the difference of means is zero: the responses do not differ")
    scale, at = first.norm, first.layer - 1
    first.by_layer(config)  # checks layer and width
    rng = np.random.default_rng(options.seed)
    unit = rng.normal(size=config.width) if options.start == "random" else first.vector
    unit = jnp.asarray(unit / np.linalg.norm(unit), jnp.float32)
    rate = options.learning_rate / config.width**0.5  # a step of Adam moves every number by it
    schedule = optax.linear_schedule(rate, 0.0, options.steps)
    optimizer = optax.adam(schedule)
    known = pair_log_probs(params, config, pairs, batch_size=options.batch_size, compute=compute)

    @jax.jit
    def update(
        unit: Array, opt_state: Any, params: Params, batch: PairBatch, plain: Array, factors: Array
    ) -> tuple[Array, Any, Array]:
        def loss(unit: Array) -> Array:
            each = reps_losses(
                scale * unit,
                params,
                config,
                batch,
                plain,
                layer=at + 1,
                factors=factors,
                negative=options.negative,
                compute=compute,
            )
            return jnp.sum(each * batch.weight) / jnp.sum(batch.weight)

        value, gradient = jax.value_and_grad(loss)(unit)
        moved, opt_state = optimizer.update(gradient, opt_state)
        return unit + jnp.asarray(moved), opt_state, value

    opt_state, losses = optimizer.init(unit), []
    where = {int(number): row for row, number in enumerate(pairs.record_index)}
    size = min(options.batch_size, len(pairs))
    batches = pair_batches(pairs, batch_size=size, seed=options.seed, buckets=2)
    for step, batch in zip(range(options.steps), batches, strict=False):
        plain = known[[where[int(number)] for number in np.asarray(batch.record_index)]]
        factors = rng.uniform(*options.factors, size).astype(np.float32)
        placed = jax.tree.map(jnp.asarray, batch)
        unit, opt_state, value = update(unit, opt_state, params, placed, plain, factors)
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise UserError(f"steering: the loss of step {step + 1} is not finite; lower the rate")
        if watch is not None:
            watch(step + 1, losses[-1])
    vector = SteeringVector(
        layer=first.layer,
        vector=np.asarray(scale * unit, np.float32),
        provenance={"method": "reps", "pairs": len(pairs), "scale": scale, **vars(options)},
    )
    return vector, losses


def reps_losses(
    vector: Float[Array, " width"],
    params: Params,
    config: DecoderConfig,
    batch: PairBatch,
    plain: LogProbs,
    *,
    layer: int,
    factors: Float[Array, " pairs"],
    negative: Negative = "null",
    compute: Compute = Compute(),
) -> Float[Array, " pairs"]:
    """`reps_loss` of a batch under a vector.

    Args:
      vector: added to the hidden states of the layer.
      params: of the decoder.
      config: of the decoder.
      batch: pairs.
      plain: log-probs of the pairs without the vector.
      layer: index of the hidden state.
      factors: multiple of the vector for each pair, of both of its responses.
      negative: "null": the vector's direction is removed; "subtract": the multiple is subtracted.
      compute: precision and memory.
    """
    rows = jnp.zeros((config.layers, config.width), vector.dtype).at[layer - 1].set(vector)

    def added(factors: Array) -> LogProbs:
        each = jnp.repeat(factors, 2)[None, :, None, None] * rows[:, None, None]
        return _sums(with_steering(params, each), config, batch, compute)

    if negative == "null":
        off = _sums(with_nulling(params, rows), config, batch, compute)
    else:
        off = added(-factors)
    return reps_loss(added(factors), off, plain, batch.response_length)


def pair_log_probs(
    params: Params,
    config: DecoderConfig,
    pairs: TokenizedPairs,
    *,
    batch_size: int = 8,
    compute: Compute = Compute(),
) -> Float[np.ndarray, "pairs 2"]:
    """Log-probs of both responses of all pairs, in their order.

    Args:
      params: of the decoder, with steering where wanted.
      config: of the decoder.
      pairs: tokenised pairs.
      batch_size: number of pairs in a batch.
      compute: precision and memory.
    """
    run = jax.jit(lambda params, batch: _sums(params, config, batch, compute))
    parts = []
    order: dict[str, Any] = {"epochs": 1, "shuffle": False, "buckets": 2}
    for batch in pair_batches(pairs, batch_size=min(batch_size, len(pairs)), **order):
        values = np.asarray(run(params, jax.tree.map(jnp.asarray, batch)))
        parts.append(values[np.asarray(batch.weight) > 0])
    return np.concatenate(parts)


def _sums(params: Params, config: DecoderConfig, batch: PairBatch, compute: Compute) -> LogProbs:
    out = response_log_probs(params, config, batch.rows(), compute=compute)
    return out.log_prob.sum(-1).reshape(-1, 2)
