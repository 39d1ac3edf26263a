"""Input of token-level losses: log-probabilities and divergences of every response token."""

from jaxtyping import Array, Bool, Float

from jaxalign.records import record


@record
class TokenLogProbs:
    """Per-token log-probabilities, in nats, of a batch of preference pairs, right padded.

    `chosen` and `rejected` are under the policy, `reference_*` under the frozen reference; `*_kl`
    is KL(reference || policy) of the next-token distributions at the same positions, through
    which gradient flows. `*_mask` is true at response tokens, the end-of-sequence token included;
    values elsewhere are never read.
    """

    chosen: Float[Array, "pairs tokens"]
    rejected: Float[Array, "pairs tokens"]
    reference_chosen: Float[Array, "pairs tokens"]
    reference_rejected: Float[Array, "pairs tokens"]
    chosen_kl: Float[Array, "pairs tokens"]
    rejected_kl: Float[Array, "pairs tokens"]
    chosen_mask: Bool[Array, "pairs tokens"]
    rejected_mask: Bool[Array, "pairs tokens"]
