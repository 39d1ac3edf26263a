"""Multiplayer Nash preference optimisation: IPO to a mixture of reference and earlier policies."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.errors import UserError
from jaxalign.losses.checks import positive
from jaxalign.losses.pairs import PairLogProbs


def past_weights(
    policies: int, decay: float = 1.0, begun: int | Int[Array, ""] | None = None
) -> Float[Array, " policies"]:
    r"""Weights of the newest policies, which sum to 1.

    .. math:: \lambda_j = \frac{d^j}{\sum_{i < n} d^i}, \quad j < n

    Args:
      policies: number of policies; the first is the newest.
      decay: d in (0, 1].
      begun: number n of policies that there are; the others get 0. None: all.
    """
    at = jnp.arange(policies)
    weights = decay**at if begun is None else jnp.where(at < begun, decay**at, 0.0)
    return jnp.asarray(weights / weights.sum(), jnp.float32)


def mnpo(
    pairs: PairLogProbs,
    past: Float[Array, "policies pairs"],
    *,
    tau: float = 0.0025,
    eta: float = 0.0075,
    decay: float = 1.0,
) -> Float[Array, " pairs"]:
    r"""Squared distance of the margin to that of a mixture of reference and earlier policies.

    .. math:: \ell = \Bigl(h - \tfrac{\tau}{\eta} h^{ref} - \bigl(1 - \tfrac{\tau}{\eta}\bigr)
              \sum_j \lambda_j h_j - \tfrac{1}{2 \eta}\Bigr)^2, \quad
              h = \log\frac{\pi(y_w)}{\pi(y_l)}, \quad
              \lambda_j \propto d^j

    With one earlier policy, which sampled the responses, it is INPO's loss: in expectation an
    iteration is a step of mirror descent, pi_{t+1} ~ (pi^ref)^{tau / eta} prod_j pi_{t-j}^{(1 -
    tau / eta) lambda_j} exp(P(y > pi_t) / eta). Its fixed point is the Nash equilibrium regularised
    with tau, for any number of earlier policies.

    Args:
      pairs: log-probabilities summed over response tokens, in nats; every field is [pairs].
      past: h_j of the earlier policies, the newest first, in nats.
      tau: strength of the regularisation to the reference, in [0, eta]. Default 0.0025: a third of
        eta, the authors' code.
      eta: inverse step size. Default 0.0075: the authors' code.
      decay: d, weight of a policy relative to the next newer one, in (0, 1]. Default 1: equal
        weights, the authors' trainer without weights.

    Returns:
      One loss per pair, [pairs], not reduced.

    Slopes:
      d_w / d_l = 1

    References:
      Wu et al., 2025, arXiv:2509.23102; with one policy: Zhang et al., 2024, arXiv:2407.00617.
    """
    positive(eta=eta)
    if not 0 <= tau <= eta:
        raise UserError(f"tau: {tau} is not in [0, eta = {eta}]")
    own, known = pairs.chosen - pairs.rejected, pairs.reference_chosen - pairs.reference_rejected
    mixed = past_weights(past.shape[0], decay).astype(past.dtype) @ past
    ratio = tau / eta
    return jnp.square(own - ratio * known - (1 - ratio) * mixed - 1 / (2 * eta))
