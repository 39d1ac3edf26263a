"""Objective of the representation stage: the distance to states moved along a difference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxalign.losses import shifted_states
from jaxalign.records import record
from jaxalign.representation.batches import StimulusBatch
from jaxalign.representation.patterns import Reader
from jaxalign.training.metrics import Mean
from jaxalign.training.objectives import Params, Policy

States = Float[Array, "rows layers positions width"]


@record
class MatchedStates:
    """Hidden states of a batch's responses at the selected layers."""

    own: States
    """Of the trained model under the plain prompt."""
    base: States
    """Of the base model."""
    difference: States
    """Of the preferred minus the dispreferred stimulus."""


@dataclass(frozen=True, kw_only=True)
class RepresentationObjective:
    r"""Adapters that move the base's hidden states along the activity pattern (RAHF).

    .. math:: \min_\theta \; \lVert h_\theta(x, y) - (h_{base}(x, y) + \alpha \, v(x, y)) \rVert

    The frozen parameters are {"policy": the base's, "positive", "negative": of the models that
    read the stimuli, None for the base}. They get no gradients.
    """

    policy: Policy
    reader: Reader
    alpha: float
    loss: Callable[..., Float[Array, " rows"]]
    """`hidden_state_matching` or `hidden_state_distance`."""
    coupled: bool = False

    def count(self, batch: StimulusBatch) -> Float[Array, ""]:
        return jnp.sum(batch.mask * batch.weight[:, None])

    def forward(
        self, trained: Params, frozen: Any, batch: StimulusBatch, key: PRNGKeyArray | None
    ) -> MatchedStates:
        rows = batch.tokens, batch.prompt_length, batch.mask.shape[1]
        params = self.policy.policy_params(trained, frozen["policy"], key)
        with jax.named_scope("policy"):
            lengths = batch.prompt_length + batch.mask.sum(1)
            states = self.reader.states(params, *rows, packed=batch.packed, lengths=lengths)
        base = frozen["policy"]
        with jax.named_scope("base"):
            base_states = self.reader.states(base, *rows, packed=batch.packed)
        with jax.named_scope("patterns"):
            models = {name: frozen[name] or base for name in ("positive", "negative")}
            positive, negative = self.reader.patterns(batch, models)
        return MatchedStates(
            own=states,
            base=jax.lax.stop_gradient(base_states),
            difference=jax.lax.stop_gradient(positive - negative),
        )

    def reduce(
        self, outputs: MatchedStates, batch: StimulusBatch, count: Float[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        moved = shifted_states(outputs.base, outputs.difference, alpha=self.alpha)
        losses = self.loss(outputs.own, moved, batch.mask)
        total = jnp.sum(jnp.where(batch.weight > 0, losses, 0.0) * batch.weight)
        tokens = jnp.sum(batch.mask * batch.weight[:, None])
        metrics = {"loss": Mean(total=total, count=tokens)}
        return total / count, metrics | self.metrics(outputs, batch)

    def metrics(self, outputs: MatchedStates, batch: StimulusBatch) -> dict[str, Mean]:
        """Metrics of how far the states have moved, over layers and tokens and for each layer.

        `pattern/norm` is the norm of the difference, `pattern/drift` the distance from the base;
        `pattern/projection` is the distance along the difference in units of its norm, alpha at the
        optimum; `pattern/cosine` is 1 if the states only moved along the difference.
        """
        real = (batch.mask & (batch.weight > 0)[:, None])[:, None].astype(jnp.float32)
        drift, v = outputs.own - outputs.base, outputs.difference
        inner = jnp.sum(drift * v, axis=-1) * real
        norms = {"norm": v, "drift": drift, "base_norm": outputs.base}
        lengths = {name: jnp.linalg.norm(x, axis=-1) * real for name, x in norms.items()}
        squares = {name: jnp.sum(jnp.square(x)) for name, x in lengths.items()}
        tokens = jnp.sum(real)
        each = tokens * v.shape[1]
        metrics = {
            f"pattern/{name}": Mean(total=jnp.sum(x), count=each) for name, x in lengths.items()
        }
        for at, layer in enumerate(self.reader.layers):
            for name in ("norm", "drift"):
                total = jnp.sum(lengths[name][:, at])
                metrics[f"pattern/layer_{layer}/{name}"] = Mean(total=total, count=tokens)
        metrics["pattern/projection"] = Mean(total=jnp.sum(inner), count=squares["norm"])
        scale = jnp.sqrt(squares["norm"] * squares["drift"])
        metrics["pattern/cosine"] = Mean(total=jnp.sum(inner), count=jnp.maximum(scale, 1e-30))
        return metrics
