r"""Equilibria of regularised preference games, to float64 accuracy.

Both players choose a policy and receive

.. math:: P_\tau(\pi \succ \pi') = \pi^T P \pi' - \tau\, \mathrm{KL}(\pi \Vert \pi^{ref})
          + \tau\, \mathrm{KL}(\pi' \Vert \pi^{ref}).
"""

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax, rel_entr, softmax

from jaxalign.errors import UserError
from jaxalign.games.preferences import Preferences

Policy = Float[np.ndarray, " actions"]

START = 5.0  # at this temperature every game is close to its reference
STEPS = 60
NEWTON_STEPS = 50


def divergence(policy: Policy, other: Policy) -> float:
    r"""Kullback-Leibler divergence of two policies, in nats.

    .. math:: \mathrm{KL}(\pi \Vert \pi') = \sum_y \pi(y) \log\frac{\pi(y)}{\pi'(y)}
    """
    return float(np.sum(rel_entr(policy, other)))


def mixture(policy: Policy, reference: Policy, beta: float) -> Policy:
    r"""Normalised geometric mixture of a policy and its reference.

    .. math:: \pi_\beta \propto \pi^{1 - \beta} (\pi^{ref})^{\beta}

    Args:
      policy: probabilities, all > 0, [actions].
      reference: probabilities, all > 0, [actions].
      beta: weight of the reference, in [0, 1].

    Returns:
      Probabilities, [actions].

    References:
      Munos et al., 2023, arXiv:2312.00886.
    """
    return softmax((1 - beta) * np.log(policy) + beta * np.log(reference))


def best_response(
    preferences: Preferences, opponent: Policy, reference: Policy, tau: float
) -> Policy:
    r"""The policy with the highest regularised preference against an opponent.

    .. math:: \pi \propto \pi^{ref} \exp\bigl(P(y \succ \pi') / \tau\bigr)

    With a behaviour policy as the opponent, offline IPO learns this policy; with rewards instead of
    preferences, it is the optimum of KL-regularised reinforcement learning.

    Args:
      preferences: P, [actions, actions].
      opponent: probabilities, [actions].
      reference: probabilities, all > 0, [actions].
      tau: weight of the divergence, > 0.

    Returns:
      Probabilities, [actions].

    References:
      Azar et al., 2023, arXiv:2310.12036, eq. 7 with the identity as Psi.
    """
    return softmax(np.log(reference) + preferences @ opponent / tau)


def duality_gap(preferences: Preferences, policy: Policy, reference: Policy, tau: float) -> float:
    r"""Duality gap of a policy: the gain of best responses for both players; 0 only at equilibrium.

    .. math:: \max_{\pi'} P_\tau(\pi' \succ \pi) - \min_{\pi'} P_\tau(\pi \succ \pi')

    Args:
      preferences: P, [actions, actions].
      policy: probabilities, [actions].
      reference: probabilities, all > 0, [actions].
      tau: weight of the divergence, > 0.

    Returns:
      The gap, >= 0 up to rounding.
    """
    scores = np.log(reference) + preferences @ policy / tau
    best = tau * float(np.logaddexp.reduce(scores)) + tau * divergence(policy, reference)
    return 2 * best - 1  # what one player gains over a half, the other loses


def equilibrium(
    preferences: Preferences, reference: Policy, tau: float, *, beta: float = 0.0
) -> Policy:
    r"""The policy that is a best response to its own mixture with the reference.

    .. math:: \pi^*_\beta \propto \pi^{ref}
              \exp\bigl(P(y \succ (\pi^*_\beta)^{1-\beta} (\pi^{ref})^{\beta}) / \tau\bigr)

    At beta = 0 it is the Nash equilibrium of the game. For other beta it is not the equilibrium,
    but what IPO-MD and Nash-MD-PG learn; its *mixture* is the equilibrium at temperature tau / (1 -
    beta). It is computed by Newton's method, with tau decreasing from a large value.

    Args:
      preferences: P, [actions, actions].
      reference: probabilities, all > 0, [actions].
      tau: weight of the divergence, > 0.
      beta: weight of the reference in the mixture, in [0, 1].

    Returns:
      Probabilities, [actions].

    Raises:
      UserError: the equations were not solved to 1e-13 in units of preference (tau too small).

    References:
      Calandriello et al., 2024, arXiv:2403.08635, prop. 4.1 (beta = 0) and 5.2.
    """
    log_reference = np.log(reference)
    ratio, residual = np.zeros_like(reference), np.inf  # ratio: log pi / pi_ref, less its mean
    for temperature in np.geomspace(max(START, tau), tau, STEPS):
        ratio, residual = _newton(preferences, log_reference, temperature, beta, ratio)
    if not residual <= 1e-13 / tau:
        raise UserError(f"equilibrium at tau = {tau}: residual {residual:.1e}; choose a larger tau")
    return softmax(log_reference + ratio)


def _newton(
    preferences: Preferences, log_reference: Policy, tau: float, beta: float, ratio: Policy
) -> tuple[Policy, float]:
    """Solve ratio = centred(P m / tau), with the mixture m; the best solution and its residual."""
    centre = np.eye(len(ratio)) - 1 / len(ratio)
    best, least = ratio, np.inf
    for _ in range(NEWTON_STEPS):
        m = np.exp(log_softmax(log_reference + (1 - beta) * ratio))
        error = ratio - centre @ preferences @ m / tau
        residual = float(np.max(np.abs(error)))
        if residual >= least:  # rounding error, or too large a step
            break
        best, least = ratio, residual
        slope = (1 - beta) * (np.diag(m) - np.outer(m, m))
        jacobian = np.eye(len(ratio)) - centre @ preferences @ slope / tau
        try:
            ratio = ratio - np.linalg.solve(jacobian, error)
        except np.linalg.LinAlgError:  # tau is so small that the identity is lost to rounding
            break
    return best, least
