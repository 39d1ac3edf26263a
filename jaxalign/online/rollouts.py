"""What online algorithms learn from: sampled responses, what annotators said of them, log-probs."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.data.batches import PairBatch
from jaxalign.losses import PairLogProbs, SampleLogProbs
from jaxalign.records import AnyArray, record


@record
class PromptBatch:
    """Prompts of one shape."""

    tokens: Int[AnyArray, "prompts length"]
    """Padded on the left."""
    length: Int[AnyArray, " prompts"]
    record_index: Int[AnyArray, " prompts"]
    """Number of the record in its source, from 0."""
    weight: Float[AnyArray, " prompts"]
    """1; 0 for the copies that fill a last, partial batch."""


@record
class RolloutBatch:
    """Prompts with several responses each, and what was said of them.

    Attributes:
      responses: rows of prompt and response; its axis `sides` runs over the responses.
      preference: probability that response i is preferred to response j; 1/2 at i = j.
      reward: of each response.
      baseline: what a response's reward is compared with; it does not depend on the response.
      sampled_log_prob: log-probs of the tokens under the policy when they were sampled; None: it
        had no part in some of them.
      advantage: of every token, for algorithms with a critic; None: they have none.
      value: of every token when it was sampled; None: there is no critic.
      returns: that the critic is to predict; None: there is no critic.
    """

    responses: PairBatch
    preference: Float[AnyArray, "prompts samples samples"]
    reward: Float[AnyArray, "prompts samples"]
    baseline: Float[AnyArray, "prompts samples"]
    sampled_log_prob: Float[AnyArray, "prompts samples response"] | None
    advantage: Float[AnyArray, "prompts samples response"] | None = None
    value: Float[AnyArray, "prompts samples response"] | None = None
    returns: Float[AnyArray, "prompts samples response"] | None = None


@record
class Rollout:
    """What a loss of an online algorithm reads: token log-probs, 0 at padding, and annotations.

    Attributes:
      log_prob: under the policy; the gradient flows through it.
      reference: under the frozen reference.
      mask: true at response tokens.
      values: what the critic says of each token, gradient and all; None: there is no critic.
      batch: the samples and what was said of them.
    """

    log_prob: Float[Array, "prompts samples response"]
    reference: Float[Array, "prompts samples response"]
    mask: Bool[Array, "prompts samples response"]
    values: Float[Array, "prompts samples response"] | None
    batch: RolloutBatch

    def pair(self, first: int, second: int) -> PairLogProbs:
        """Two responses to each prompt as a preference loss reads them: [prompts]."""
        sums, lengths = self.log_prob.sum(-1), self.mask.sum(-1).astype(jnp.int32)
        reference = self.reference.sum(-1)
        return PairLogProbs(
            chosen=sums[:, first],
            rejected=sums[:, second],
            reference_chosen=reference[:, first],
            reference_rejected=reference[:, second],
            chosen_length=lengths[:, first],
            rejected_length=lengths[:, second],
        )

    def sample(self, number: int) -> SampleLogProbs:
        """One response to each prompt as a policy gradient reads it: [prompts, response]."""
        return SampleLogProbs(
            log_prob=self.log_prob[:, number],
            reference=self.reference[:, number],
            mask=self.mask[:, number],
        )
