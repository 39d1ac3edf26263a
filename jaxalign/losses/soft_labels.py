"""A preference loss under labels that are probabilities: the loss of online methods."""

from collections.abc import Callable

from jaxtyping import Array, Float

from jaxalign.losses.checks import Strength
from jaxalign.losses.pairs import PairLogProbs


def soft_label(
    loss: Callable[..., Float[Array, " pairs"]],
    pairs: PairLogProbs,
    preference: Float[Array, " pairs"],
    **options: Strength,
) -> Float[Array, " pairs"]:
    r"""Expectation of a preference loss over a label drawn with a known probability.

    .. math:: \ell = p\, \ell(y, y') + (1 - p)\, \ell(y', y), \quad p = P(y \succ y')

    With `ipo` this is online IPO (and IPO-MD, where the responses come from a mixture), with `dpo`
    online DPO and with `slic_norm` online SLiC. For `ipo` it equals
    (h - (p - 1/2) / tau)^2 + (1/4 - (p - 1/2)^2) / tau^2: a regression whose target is the
    preference itself.

    Args:
      loss: a preference loss of single pairs, `loss(pairs, **options)`; a batch-coupled loss
        would be evaluated on the batch in each order.
      pairs: log-probabilities summed over response tokens, in nats, first response as `chosen`,
        second as `rejected`, in the order in which they were sampled; every field is [pairs].
      preference: probability p that the first response is preferred, in [0, 1], [pairs]; 1 or 0
        for a hard label. No gradient should flow through it.
      options: hyperparameters of `loss`.

    Returns:
      One loss per pair, [pairs], not reduced. At p = 1 it is `loss(pairs)`.

    Slopes:
      d_w / d_l = 1 for losses of the margin alone

    References:
      Calandriello et al., 2024, arXiv:2403.08635, section 4.
    """
    agree, flipped = loss(pairs, **options), loss(pairs.swapped, **options)
    return preference * agree + (1 - preference) * flipped
