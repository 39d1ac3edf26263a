"""Self-play preference optimisation in iterations (Wu et al., 2024, arXiv:2405.00675)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses import sppo_soft
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rollouts import Rollout


def sppo(*, beta: float = 1e-3, samples: int = 5, iteration: int = 313) -> Algorithm:
    r"""Log-ratios to the iteration's first policy regress on win rates against it.

    .. math:: \ell = \frac{1}{K} \sum_i \Bigl(\log\frac{\pi(y_i)}{\pi_t(y_i)}
              - \frac{P_i - 1/2}{\beta}\Bigr)^2, \quad
              P_i = \frac{1}{K - 1} \sum_{j \ne i} P(y_i \succ y_j), \quad y_i \sim \pi_t

    An iteration is a step of multiplicative weights, pi_{t+1} ~ pi_t exp(P / beta). All samples
    are trained on; the authors' code takes the best and the worst of five.

    Args:
      beta: the step size is 1 / beta. Default 0.001: the paper's.
      samples: number of responses to each prompt, K >= 2. Default 5: the paper's.
      iteration: rollouts after which pi_t is set to the current policy. Default 313: the
        paper's third of 60,000 prompts in batches of 64.
    """
    if samples < 2:
        raise UserError(f"samples: {samples} response to a prompt has no rival; use 2 or more")

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        preference = rollout.batch.preference
        wins = (preference.sum(-1) - 0.5) / (samples - 1)  # less the tie with itself
        pairs = [(at, (at + 1) % samples) for at in range(samples)]  # each response twice
        values = [
            sppo_soft(rollout.pair(i, j), wins[:, i], wins[:, j], beta=beta) for i, j in pairs
        ]
        return jnp.mean(jnp.stack(values), axis=0) / 2

    return Algorithm(
        draws=(Draw(policy=0.0, previous=1.0),) * samples,
        loss=of_rollout,
        annotation="preferences",
        trained=samples,
        iteration=iteration,
    )
