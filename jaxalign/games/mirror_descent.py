"""Mirror descent on tabular policies in closed form: Nash-MD, its plain form, extragradient."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

from jaxalign.errors import UserError
from jaxalign.games.equilibrium import Policy
from jaxalign.games.preferences import Preferences

Opponent = Literal["mixture", "policy", "half_step"]


def munos_steps(tau: float) -> Callable[[int], float]:
    """Step sizes 2 / (tau (t + 2)), with which Nash-MD converges (Munos et al., theorem 1)."""
    return lambda t: 2 / (tau * (t + 2))


def mirror_descent(
    preferences: Preferences,
    reference: Policy,
    tau: float,
    *,
    steps: int,
    step_size: float | Callable[[int], float],
    opponent: Opponent = "mixture",
    start: Policy | None = None,
) -> Float[np.ndarray, "iterates actions"]:
    r"""Policies of mirror descent against an opponent derived from the current policy.

    .. math:: \pi_{t+1} \propto m_t \exp\bigl(\eta_t P(y \succ o_t)\bigr), \quad
              m_t \propto \pi_t^{1 - \eta_t\tau} (\pi^{ref})^{\eta_t\tau}

    Args:
      preferences: P, [actions, actions].
      reference: probabilities, all > 0, [actions].
      tau: weight of the divergence from the reference, > 0.
      steps: number of iterations.
      step_size: eta, or a function from the iteration to it; eta tau must be in [0, 1].
      opponent: o_t. "mixture": m_t (Nash-MD; its fixed point at constant eta is
        pi*_beta with beta = eta tau, not the equilibrium). "policy": pi_t (online mirror
        descent). "half_step": the result of a first step against pi_t (extragradient).
      start: first policy, [actions]. Default: the reference.

    Returns:
      The policies, including the first one, [steps + 1, actions].

    Raises:
      UserError: eta tau is outside [0, 1].

    References:
      Munos et al., 2023, arXiv:2312.00886, section on Nash-MD; extragradient: Zhou et al., 2025,
      arXiv:2503.08942.
    """
    log_reference = np.log(reference)
    log_policy = log_reference if start is None else np.log(start)
    iterates = [log_policy]
    for t in range(steps):
        eta = step_size(t) if callable(step_size) else step_size
        if not 0 <= eta * tau <= 1:
            raise UserError(f"step_size = {eta} at step {t}: must be in [0, 1 / tau = {1 / tau}]")
        m = log_softmax((1 - eta * tau) * log_policy + eta * tau * log_reference)
        other = m if opponent == "mixture" else log_policy
        if opponent == "half_step":
            other = log_softmax(m + eta * preferences @ np.exp(other))
        log_policy = log_softmax(m + eta * preferences @ np.exp(other))
        iterates.append(log_policy)
    return np.exp(np.stack(iterates))
