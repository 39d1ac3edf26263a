"""Input of losses of single responses: one row of log-probabilities per labelled response."""

from jaxtyping import Array, Bool, Float, Int

from jaxalign.records import record


@record
class LabelledLogProbs:
    """Log-probabilities, in nats, summed over response tokens, of a batch of labelled responses.

    Attributes:
      log_prob: under the policy.
      reference: under the frozen reference.
      desirable: the label.
      length: response tokens, the end-of-sequence token included.
      mismatched_log_ratio: log pi - log pi^ref of each prompt with the response of another row of
        the batch, without gradient; NaN where the loss does not declare that it reads them.
    """

    log_prob: Float[Array, " responses"]
    reference: Float[Array, " responses"]
    desirable: Bool[Array, " responses"]
    length: Int[Array, " responses"]
    mismatched_log_ratio: Float[Array, " responses"]

    @property
    def log_ratio(self) -> Float[Array, " responses"]:
        """Log-ratio r = log pi - log pi^ref, in nats; times beta, the implicit reward."""
        return self.log_prob - self.reference
