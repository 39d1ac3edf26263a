"""Data of online algorithms: prompts, sampled responses, annotations and log-probs."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.data.batches import PairBatch
from jaxalign.losses import PairLogProbs, SampleLogProbs
from jaxalign.records import AnyArray, record, static


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
      importance: of each token, its probability under the policy over that under the distribution
        sampled from, which top-k, top-p and min-p truncate; None: they are equal, or no loss reads
        it.
      advantage: of every token; None: the loss computes its own.
      value: of every token when it was sampled; None: there is no critic.
      returns: targets of the critic; None: there is no critic.
    """

    responses: PairBatch
    preference: Float[AnyArray, "prompts samples samples"]
    reward: Float[AnyArray, "prompts samples"]
    baseline: Float[AnyArray, "prompts samples"]
    sampled_log_prob: Float[AnyArray, "prompts samples response"] | None
    importance: Float[AnyArray, "prompts samples response"] | None = None
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
      max_tokens: longest response that the sampler allows; 0: the width of the arrays.
    """

    log_prob: Float[Array, "prompts samples response"]
    reference: Float[Array, "prompts samples response"]
    mask: Bool[Array, "prompts samples response"]
    values: Float[Array, "prompts samples response"] | None
    batch: RolloutBatch
    max_tokens: int = static(0)

    @property
    def longest(self) -> int:
        """The longest response that the sampler allows."""
        return self.max_tokens or self.log_prob.shape[-1]

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

    def samples(self) -> SampleLogProbs:
        """All responses, prompt by prompt: [prompts * samples, response]."""
        return SampleLogProbs(
            log_prob=by_row(self.log_prob),
            reference=by_row(self.reference),
            mask=by_row(self.mask),
        )


def by_row(x: Array) -> Array:
    """[prompts, samples, ...] -> [prompts * samples, ...]."""
    return x.reshape(-1, *x.shape[2:])
