"""Input of losses on single sampled responses: log-probabilities of every response token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.records import record


@record
class SampleLogProbs:
    """Per-token log-probabilities, in nats, of a batch of responses sampled from the policy.

    `log_prob` is under the policy, `reference` under the frozen reference; `mask` is true at
    response tokens, the end-of-sequence token included. Values elsewhere are never read.
    """

    log_prob: Float[Array, "rows response"]
    reference: Float[Array, "rows response"]
    mask: Bool[Array, "rows response"]

    @property
    def scored(self) -> Float[Array, "rows response"]:
        """Log-prob of each token under the policy, 0 at padding."""
        return jnp.where(self.mask, self.log_prob, 0.0)

    @property
    def log_ratio(self) -> Float[Array, "rows response"]:
        """Log-ratio log pi - log pi^ref of each token, in nats, 0 at padding."""
        return self.scored - jnp.where(self.mask, self.reference, 0.0)
