"""Multiplayer Nash preference optimisation (Wu et al., 2025, arXiv:2509.23102)."""

import dataclasses

from jaxalign.online.algorithm import Algorithm
from jaxalign.online.algorithms.inpo import inpo


def mnpo(
    *,
    tau: float = 0.0025,
    eta: float = 0.0075,
    past: int = 2,
    decay: float = 1.0,
    samples: int = 2,
    iteration: int = 100,
) -> Algorithm:
    r"""INPO whose mixture has the policies that began several iterations, not the last one alone.

    .. math:: \ell = \Bigl(h - \tfrac{\tau}{\eta} h^{ref} - \bigl(1 - \tfrac{\tau}{\eta}\bigr)
              \sum_{j < n} \lambda_j h_{t-j} - \tfrac{1}{2\eta}\Bigr)^2, \quad
              \lambda_j \propto d^j, \quad y \sim \pi_t

    The loss is `jaxalign.losses.mnpo`. Before iteration n there are fewer policies, and the weights
    are those of these. Each policy is a copy of the trained parameters and costs a forward pass.

    Args:
      tau: strength of the regularisation to the reference, in [0, eta]. Default 0.0025: a third of
        eta, the authors' code.
      eta: inverse step size. Default 0.0075: the authors' code.
      past: n, number of policies. Default 2: the authors' code; 1 is INPO.
      decay: d, weight of a policy relative to the next newer one, in (0, 1]. Default 1: ours.
      samples: number of responses to each prompt; all their pairs are compared. Default 2: ours.
      iteration: rollouts after which pi_t is set to the current policy. Default 100: ours.
    """
    plain = inpo(tau=tau, eta=eta, samples=samples, iteration=iteration)
    return dataclasses.replace(plain, past=past, past_decay=decay)
