"""Iterative Nash policy optimisation (Zhang et al., 2024, arXiv:2407.00617)."""

import dataclasses

from jaxalign.errors import UserError
from jaxalign.losses import ipo
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.algorithms.contrastive import contrastive


def inpo(
    *, tau: float = 0.0025, eta: float = 0.0075, samples: int = 2, iteration: int = 100
) -> Algorithm:
    r"""IPO to a mixture of the reference and the policy that began the iteration and sampled.

    .. math:: \ell = \Bigl(h - \tfrac{\tau}{\eta} h^{ref} - \bigl(1 - \tfrac{\tau}{\eta}\bigr) h_t
              - \tfrac{1}{2\eta}\Bigr)^2, \quad
              h = \log\frac{\pi(y_w)}{\pi(y_l)}, \quad
              y \sim \pi_t

    In expectation an iteration is a step of online mirror descent, pi_{t+1} ~ pi_t^{1 - tau / eta}
    (pi^ref)^{tau / eta} exp(P(y > pi_t) / eta), whose last iterate converges to the Nash
    equilibrium regularised with tau.

    Args:
      tau: strength of the regularisation to the reference, in [0, eta]. Default 0.0025: a third of
        eta, the authors' code.
      eta: inverse step size. Default 0.0075: the authors' code.
      samples: number of responses to each prompt; all their pairs are compared. Default 2; the
        paper compares the best and the worst of 8.
      iteration: rollouts after which pi_t is set to the current policy. Default 100: ours.
    """
    if not 0 <= tau <= eta:
        raise UserError(f"tau: {tau} is not in [0, eta = {eta}]")
    return dataclasses.replace(
        contrastive(ipo, Draw(policy=0.0, previous=1.0), samples, tau=eta),
        iteration=iteration,
        anchor=tau / eta,
    )
