"""The largest batch that a stage may get, as shapes, and what its step puts through networks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.commands.representation import POSITIONS
from jaxalign.commands.scores import trains_scores
from jaxalign.commands.training_data import joint_share
from jaxalign.commands.updates import has_reference
from jaxalign.config import TrainConfig
from jaxalign.data import PairBatch, TextBatch
from jaxalign.models import DecoderConfig
from jaxalign.online import RolloutBatch
from jaxalign.representation import StimulusBatch
from jaxalign.training.objectives import ReferencedBatch
from jaxalign.training.work import Rows

Largest = tuple[Any, list[Rows]]


def largest_batch(
    config: TrainConfig,
    name: str,
    objective: Any,
    *,
    platform: str,
    response: int | None = None,
) -> Largest:
    """Shapes of a stage's largest batch, and the passes that a step on it makes.

    Args:
      config: of the run.
      name: the stage's.
      objective: what it minimises.
      platform: that the step is for.
      response: tokens of the longest response of a pair or an encoder-decoder's row; None: rows may
        be all response.
    """
    model_config = objective.policy.config
    length, decoder = config.max_length, isinstance(model_config, DecoderConfig)
    response = response or length
    rows = getattr(config, name).batch_size
    if name == "online":
        return _rollouts(config, objective)
    if name == "representation":
        return _stimuli(config, objective)
    if name == "preference":
        return _preferences(config, objective, response, platform)
    if decoder:
        return _texts(rows, length), [
            Rows(rows=rows, length=length, scored=length, forward=1, backward=1)
        ]
    return pair_structs(rows, 2, length, response), [
        Rows(rows=rows, length=length, scored=response, forward=1, backward=1)
    ]


def pair_structs(
    pairs: int, sides: int, length: int, response: int, *, joint: int | None = None
) -> PairBatch:
    """Shapes of a batch of pairs, or of prompts with so many responses.

    Args:
      pairs: rows of the batch.
      sides: responses to each prompt.
      length: tokens of prompt and response.
      response: tokens of a response.
      joint: tokens of both rows of a pair in one; None: there are no such rows.
    """

    def batch() -> PairBatch:
        return PairBatch(
            tokens=jnp.zeros((pairs, sides, length), jnp.int32),
            prompt_length=jnp.zeros((pairs, sides), jnp.int32),
            response_tokens=jnp.zeros((pairs, sides, response), jnp.int32),
            response_length=jnp.zeros((pairs, sides), jnp.int32),
            record_index=jnp.zeros(pairs, jnp.int32),
            weight=jnp.zeros(pairs),
            joint_tokens=None if joint is None else jnp.zeros((pairs, joint), jnp.int32),
            common_length=None if joint is None else jnp.zeros(pairs, jnp.int32),
        )

    return jax.eval_shape(batch)


def _struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _texts(rows: int, length: int) -> TextBatch:
    """Packed text: documents, or prompts and responses."""
    fields = ("tokens", "segment_ids", "positions", "target_mask")
    return _built(
        TextBatch,
        **{name: _struct(rows, length) for name in fields},
        record_index=_struct(rows),
        weight=_struct(rows, dtype=jnp.float32),
    )


def _built(kind: Callable[..., Any], **fields: Any) -> Any:
    """A record of arrays with these shapes."""
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)  # noqa: E731
    return jax.eval_shape(lambda: kind(**zeros(fields)))


def _preferences(config: TrainConfig, objective: Any, response: int, platform: str) -> Largest:
    """Pairs; their rows two in one where the run makes them so."""
    stage, length = config.preference, config.max_length
    scored = trains_scores(config, "preference")
    share = joint_share(config.share_prompts, objective.policy.config, platform)
    joint = length + response  # both responses, and what is left of the prompt once
    joint = joint if joint <= share * 2 * length else None
    pairs = pair_structs(stage.batch_size, 2, length, response, joint=joint)
    seen = 1 if scored else response
    if joint is None or config.entanglement.every:  # a watched step keeps rows apart
        shape = {"rows": 2 * stage.batch_size, "length": length, "scored": seen}
    else:
        shape = {"rows": stage.batch_size, "length": joint, "scored": 2 * seen}
    if scored:
        return pairs, [Rows(**shape, forward=1, backward=1)]
    # auto: how many pairs there are is not known
    live = has_reference(objective) and config.reference != "precomputed"
    twice = objective.coupled and stage.micro_batches > 1  # first the statistic, then the gradient
    forward = 1 + live + twice + (config.entanglement.every > 0 and config.entanglement.realised)
    stored = has_reference(objective) and not live
    known = _struct(stage.batch_size, 2, dtype=jnp.float32) if stored else None
    batch = _built(ReferencedBatch, pairs=pairs, reference=known)
    return batch, [Rows(**shape, forward=forward, backward=1)]


def _rollouts(config: TrainConfig, objective: Any) -> Largest:
    """Prompts with their sampled responses; the first ones of each are learned from."""
    wanted, algorithm = config.rollout, objective.algorithm
    prompts, response = config.online.batch_size, wanted.max_tokens
    length, samples = wanted.max_prompt_length + response, len(algorithm.draws)
    of_policy = all("policy" in draw.weights for draw in algorithm.draws)
    of_tokens = _struct(prompts, samples, response, dtype=jnp.float32)
    of_samples = _struct(prompts, samples, dtype=jnp.float32)
    batch = _built(
        RolloutBatch,
        responses=pair_structs(prompts, samples, length, response),
        preference=_struct(prompts, samples, samples, dtype=jnp.float32),
        reward=of_samples,
        baseline=of_samples,
        sampled_log_prob=of_tokens if of_policy else None,
    )
    critic = algorithm.advantages is not None  # asked once before the updates
    forward = 2 * (algorithm.updates + critic)  # policy and reference
    rows = prompts * algorithm.trained
    shape = {"rows": rows, "length": length, "scored": response}
    return batch, [Rows(**shape, forward=forward, backward=algorithm.updates)]


def _stimuli(config: TrainConfig, objective: Any) -> Largest:
    """Plain rows to be fitted, and the stimuli that are read beside them."""
    wanted, rows, length = config.alignment, config.representation.batch_size, config.max_length
    positions = min(wanted.positions or POSITIONS[wanted.method], length)
    instructed = wanted.method == "scit"
    batch = _built(
        StimulusBatch,
        tokens=_struct(rows, length),
        prompt_length=_struct(rows),
        stimuli=_struct(rows, 2, length) if instructed else None,
        stimuli_prompt_length=_struct(rows, 2) if instructed else None,
        mask=_struct(rows, positions, dtype=jnp.bool_),
        record_index=_struct(rows),
        weight=_struct(rows, dtype=jnp.float32),
    )
    reader = objective.reader
    shape = {"length": length, "scored": 0, "depth": reader.layers[-1] / reader.config.layers}
    read = 1 + (wanted.positive_model is not None)  # the base's own pass is the one at rest, too
    others = Rows(rows=2 * rows, **shape, forward=1) if instructed else None
    others = others or Rows(rows=rows, **shape, forward=read)
    return batch, [Rows(rows=rows, **shape, forward=2, backward=1), others]
