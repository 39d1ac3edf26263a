"""Online IPO, IPO-MD, online DPO and online SLiC: a preference loss on the policy's samples.

Samples and preferences carry no gradient; the loss reads policy and reference, never the mixture
that sampled.

Calandriello et al., 2024, arXiv:2403.08635, sections 4 and 5.
"""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses import dpo, ipo, slic_norm, soft_label
from jaxalign.losses.checks import Strength
from jaxalign.online.algorithm import Algorithm, Draw, mixture_with_reference
from jaxalign.online.rollouts import Rollout


def contrastive(
    loss: Callable[..., Float[Array, " pairs"]], draw: Draw, samples: int, **options: Strength
) -> Algorithm:
    r"""A preference loss under soft labels, averaged over all pairs of a prompt's responses.

    .. math:: \ell = \frac{2}{K (K - 1)} \sum_{i < j}
              \bigl[p_{ij} \ell(y_i, y_j) + (1 - p_{ij}) \ell(y_j, y_i)\bigr], \quad
              y_i \sim \mathrm{sg}[\text{draw}]

    Args:
      loss: of the table of preference losses.
      draw: source of all responses.
      samples: number of responses to each prompt, K >= 2.
      **options: of the loss.
    """
    if samples < 2:
        raise UserError(f"samples: {samples} response to a prompt makes no pair; use 2 or more")

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        preference = rollout.batch.preference
        values = [
            soft_label(loss, rollout.pair(i, j), preference[:, i, j], **options)
            for i, j in itertools.combinations(range(samples), 2)
        ]
        return jnp.mean(jnp.stack(values), axis=0)

    return Algorithm(
        draws=(draw,) * samples, loss=of_rollout, annotation="preferences", trained=samples
    )


def online_ipo(*, tau: Strength = 1.0, samples: int = 2) -> Algorithm:
    """IPO on the policy's own samples: its fixed point is the regularised Nash equilibrium.

    Args:
      tau: strength of the regularisation to the reference. Default 1.0: the paper's choice
        (appendix B.3).
      samples: number of responses to each prompt; the paper's 2.
    """
    return contrastive(ipo, Draw(), samples, tau=tau)


def ipo_md(*, tau: Strength = 1.0, beta: float = 0.125, samples: int = 2) -> Algorithm:
    """IPO on samples of the geometric mixture: the mixture, not the policy, is the equilibrium.

    Args:
      tau: strength of the regularisation to the reference; the mixture is the Nash equilibrium at
        tau / (1 - beta). Default 1.0: the paper's choice.
      beta: weight of the reference in the mixture. Default 0.125: the paper's choice.
      samples: number of responses to each prompt; the paper's 2.
    """
    return contrastive(ipo, mixture_with_reference(beta), samples, tau=tau)


def online_dpo(*, beta: Strength = 5.0, samples: int = 2) -> Algorithm:
    """DPO on the policy's own samples, with soft labels.

    Args:
      beta: inverse temperature. Default 5.0: the IPO-MD paper's choice for its baseline.
      samples: number of responses to each prompt.
    """
    return contrastive(dpo, Draw(), samples, beta=beta)


def online_slic(*, beta: Strength = 10.0, samples: int = 2) -> Algorithm:
    """SLiC's hinge, normalised by the reference, on the policy's own samples.

    Args:
      beta: scale of the margin. Default 10.0: the IPO-MD paper's choice for its baseline.
      samples: number of responses to each prompt.
    """
    return contrastive(slic_norm, Draw(), samples, beta=beta)
