"""Extragradient preference optimisation (Zhou et al., 2025, arXiv:2503.08942)."""

from jaxtyping import Array, Float

from jaxalign.losses import egpo as loss
from jaxalign.losses.checks import Strength
from jaxalign.online.algorithm import Algorithm, Draw, mixture_with_reference
from jaxalign.online.rollouts import Rollout


def egpo(*, tau: Strength = 0.1, beta: float = 0.0) -> Algorithm:
    r"""Two steps from the same policy: against itself, then against the first step's result.

    .. math:: \ell = \Bigl(h - \frac{P(y \succ y'') - P(y' \succ y'')}{\tau}\Bigr)^2, \quad
              y'' \sim \pi_t, \text{ then } y'' \sim \pi_{t + 1/2}

    Steps alternate. An odd step goes from pi_t to pi_{t + 1/2}. The next one samples from
    pi_{t + 1/2}, undoes that step, and takes its own gradient at pi_t. The optimiser's state is
    read by both and changed by the second alone (`training.optimizers.with_extragradient`), so
    its moments and the learning rate's schedule count pairs of steps. Against one opponent the
    last iterate only circles the equilibrium; with both it converges to it linearly.

    Args:
      tau: strength of the regularisation to the reference. Default 0.1: the authors' for language
        models.
      beta: weight of the reference in the mixture from which y and y' are sampled, which has no
        part in the fixed point. Default 0: the policy.
    """

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        preference = rollout.batch.preference
        return loss(rollout.pair(0, 1), preference[:, 0, 2], preference[:, 1, 2], tau=tau)

    draw = mixture_with_reference(beta)
    return Algorithm(
        draws=(draw, draw, Draw()),
        loss=of_rollout,
        annotation="preferences",
        trained=2,
        extragradient=True,
    )
