"""Data of online algorithms: prompts, sampled responses, annotations and log-probs."""

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
    """Index of the record in its source."""
    weight: Float[AnyArray, " prompts"]
    """1; 0 for the copies that fill a last, partial batch."""


@record
class RolloutBatch:
    """Prompts with several responses each, and their annotations.

    Attributes:
      responses: rows of prompt and response; its axis `sides` runs over the responses.
      preference: probability that response i is preferred to response j; 1/2 at i = j.
      reward: of each response.
      baseline: of each reward; it does not depend on the response itself.
      sampled_log_prob: log-probs of the tokens under the policy that sampled; None: some were not
        sampled by the policy.
      advantage: of every token; None: there is no critic.
      value: of every token when it was sampled; None: there is no critic.
      returns: targets of the critic; None: there is no critic.
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
    """Input of an online algorithm's loss: token log-probs, 0 at padding, and annotations.

    Attributes:
      log_prob: under the policy, with gradients.
      reference: under the frozen reference.
      mask: true at response tokens.
      values: the critic's value of each token, with gradients; None: there is no critic.
      batch: the samples and their annotations.
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
