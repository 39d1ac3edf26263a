"""Policy gradients regularised towards the reference, on rewards and on preferences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses.checks import Strength, non_negative
from jaxalign.losses.samples import SampleLogProbs


def regularised_policy_gradient(
    samples: SampleLogProbs,
    reward: Float[Array, " rows"],
    baseline: Float[Array, " rows"],
    *,
    tau: Strength = 0.05,
) -> Float[Array, " rows"]:
    r"""Surrogate whose gradient is minus the gradient of reward less divergence.

    .. math:: \ell = -\sum_n \mathrm{sg}\Bigl(R - b - \tau \sum_{k \ge n} \rho_k\Bigr)
                     \log\pi(y_n), \quad
              \rho_k = \log\pi(y_k) - \log\pi^{ref}(y_k)

    The weight of a token has the log-ratios of itself and of all later tokens. Those of earlier
    tokens have mean zero and would only add variance; its own alone would give a wrong gradient of
    the divergence, because a token also determines which later ones are sampled. Only the gradient
    of the surrogate has a meaning, and only at the policy that sampled.

    Args:
      samples: per-token log-probabilities of responses sampled from the policy, in nats; every
        field is [rows, response].
      reward: reward R of each response, [rows].
      baseline: number b that does not depend on the row's own response, [rows]; it leaves the
        expected gradient unchanged and lowers its variance. See `leave_one_out`.
      tau: weight of the divergence from the reference, >= 0. Default 0.05: the online preference
        optimisation paper's choice for its reward-model baseline.

    Returns:
      One surrogate per row, [rows], not reduced.

    Slopes:
      the weight of each token's log-prob is the bracket

    References:
      Calandriello et al., 2024, arXiv:2403.08635 (the regularised policy gradient it compares
      with).
    """
    non_negative(tau=tau)
    log_ratio = samples.log_ratio
    to_go = jnp.cumsum(log_ratio[:, ::-1], axis=-1)[:, ::-1]
    weight = jax.lax.stop_gradient((reward - baseline)[:, None] - tau * to_go)
    return -jnp.sum(weight * samples.scored, axis=-1)


def nash_md_pg(
    samples: SampleLogProbs, preference: Float[Array, " rows"], *, tau: Strength = 0.008
) -> Float[Array, " rows"]:
    r"""Surrogate of Nash-MD-PG: a policy gradient on preferences over an opponent's responses.

    .. math:: \ell = -\sum_n \mathrm{sg}\Bigl(p - \tfrac12 - \tau \sum_{k \ge n} \rho_k\Bigr)
                     \log\pi(y_n), \quad
              p = P(y \succ y'), \quad
              \rho_k = \log\pi(y_k) - \log\pi^{ref}(y_k)

    Responses y come from the policy and opponents y' from the mixture of policy and reference
    with weight beta; at beta = 0 this is self-play, at 1 a best response to the reference. One
    half, the preference of a response over itself, replaces a learned baseline.

    Args:
      samples: per-token log-probabilities of responses sampled from the policy, in nats; every
        field is [rows, response]. Opponents enter through the preference alone.
      preference: probability p that each response is preferred to its opponent, in [0, 1], [rows].
      tau: weight of the divergence from the reference, >= 0. Default 0.008: the paper's.

    Returns:
      One surrogate per row, [rows], not reduced.

    Slopes:
      the weight of each token's log-prob is the bracket

    References:
      Munos et al., 2023, arXiv:2312.00886 (Nash-MD-PG).
    """
    half = jnp.full_like(preference, 0.5)
    return regularised_policy_gradient(samples, preference, half, tau=tau)


def leave_one_out(rewards: Float[Array, "prompts samples"]) -> Float[Array, "prompts samples"]:
    r"""Baseline of each response: the mean reward of the other responses to the same prompt.

    .. math:: b_i = \frac{1}{K - 1} \sum_{j \ne i} R_j

    Args:
      rewards: rewards of K >= 2 responses to each prompt, [prompts, samples].

    Returns:
      The baselines, [prompts, samples].

    Raises:
      UserError: there is one response per prompt.

    References:
      Kool et al., 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al.,
      2024, arXiv:2402.14740 (RLOO).
    """
    count = rewards.shape[-1]
    if count < 2:
        raise UserError("leave_one_out: 1 response per prompt leaves no others: sample 2 or more")
    return (jnp.sum(rewards, axis=-1, keepdims=True) - rewards) / (count - 1)
