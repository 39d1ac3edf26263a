"""The GRPO family: clipped policy gradients without a critic, on rewards of groups of responses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses.checks import Strength, non_negative, positive
from jaxalign.losses.ppo import Tokens, ppo_token_rewards, whiten
from jaxalign.losses.samples import SampleLogProbs

Rows = Float[Array, " rows"]


def group_advantages(
    rewards: Float[Array, "prompts samples"], *, scaled: bool = True, epsilon: float = 1e-4
) -> Float[Array, "prompts samples"]:
    r"""Advantages of responses over the mean of their group, the responses to the same prompt.

    .. math:: A_i = \frac{R_i - \bar R}{s + \epsilon}, \quad
              s^2 = \frac{1}{G - 1} \sum_i (R_i - \bar R)^2

    Args:
      rewards: of G >= 2 responses to each prompt, [prompts, samples].
      scaled: whether to divide by the standard deviation; Dr. GRPO (arXiv:2503.20783) does not.
      epsilon: added to the standard deviation, > 0. Default 1e-4: TRL's.

    Returns:
      The advantages, [prompts, samples]; 0 in a group without spread. No gradient flows.

    Raises:
      UserError: there is one response per prompt.

    References:
      Shao et al., 2024, arXiv:2402.03300, section 4.1.
    """
    positive(epsilon=epsilon)
    if rewards.shape[-1] < 2:
        raise UserError("group_advantages: 1 response per prompt is no group: sample 2 or more")
    rewards = jax.lax.stop_gradient(rewards)
    rewards = rewards - rewards[..., :1]  # so that equal ones are exactly 0
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    if not scaled:
        return centred
    return centred / (jnp.std(rewards, axis=-1, ddof=1, keepdims=True) + epsilon)


def k3_divergence(samples: SampleLogProbs) -> Tokens:
    r"""Estimate of the divergence from the reference at each token: unbiased and not negative.

    .. math:: k_3 = e^{-\rho} + \rho - 1, \quad
              \rho = \log\pi(y_n) - \log\pi^{ref}(y_n)

    As a loss its gradient is that of the divergence from the policy to the reference only to first
    order in rho; `regularised_policy_gradient` has the exact one.

    Args:
      samples: log-probabilities in nats, [rows, response].

    Returns:
      One estimate per token, [rows, response], 0 at padding.

    References:
      Schulman, 2020, "Approximating KL divergence"; Shao et al., 2024, arXiv:2402.03300, eq. 4.
    """
    return jnp.expm1(-samples.log_ratio) + samples.log_ratio


def grpo(
    samples: SampleLogProbs,
    old_log_prob: Tokens,
    advantages: Rows,
    importance: Tokens | None = None,
    *,
    clip: float = 0.2,
    clip_high: float = 0.2,
    beta: Strength = 0.04,
) -> Rows:
    r"""Group relative policy optimisation: the mean over a response's tokens.

    .. math:: \ell = \frac{1}{L} \sum_n \bigl[-w_n \min(A \varrho_n, A\, \mathrm{clip}(\varrho_n,
                     1 - c, 1 + c_h)) + \beta k_3\bigr], \quad
              \varrho_n = \pi(y_n) / \pi_{old}(y_n), \quad
              k_3 = e^{-\rho} + \rho - 1, \quad
              \rho = \log\pi(y_n) - \log\pi^{ref}(y_n)

    Args:
      samples: log-probabilities under policy and reference, in nats, [rows, response].
      old_log_prob: under the policy that sampled, [rows, response].
      advantages: advantage A of each response, [rows]; see `group_advantages`.
      importance: weight w of each token, the old policy's probability over that of the distribution
        sampled from; None: 1.
      clip: how far a ratio may fall, in [0, 1). Default 0.2: TRL's.
      clip_high: how far it may rise, > 0. Default 0.2: TRL's.
      beta: weight of the divergence, >= 0. Default 0.04: the paper's.

    Returns:
      One loss per row, [rows], not reduced.

    Slopes:
      the weight of a token's log-prob is A w / L times its ratio, or 0 where clipped

    References:
      Shao et al., 2024, arXiv:2402.03300, eq. 3.
    """
    tokens = _clipped_tokens(samples, old_log_prob, advantages, importance, clip, clip_high, beta)
    return jnp.sum(tokens, axis=-1) / _lengths(samples)


def dr_grpo(
    samples: SampleLogProbs,
    old_log_prob: Tokens,
    advantages: Rows,
    importance: Tokens | None = None,
    *,
    max_tokens: int,
    clip: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
) -> Rows:
    r"""GRPO done right: the sum over a response's tokens, divided by a constant.

    .. math:: \ell = \frac{1}{M} \sum_n \bigl[-w_n \min(A \varrho_n, A\, \mathrm{clip}(\varrho_n,
                     1 - c, 1 + c_h)) + \beta k_3\bigr], \quad
              \varrho_n = \pi(y_n) / \pi_{old}(y_n)

    A mean over tokens favours short right responses and long wrong ones; a constant does not.

    Args:
      samples: as in `grpo`.
      old_log_prob: as in `grpo`.
      advantages: as in `grpo`; the paper does not divide them by the standard deviation.
      importance: as in `grpo`.
      max_tokens: constant M, the largest number of tokens of a response.
      clip: as in `grpo`.
      clip_high: as in `grpo`.
      beta: weight of the divergence, >= 0. Default 0: the paper's.

    Returns:
      One loss per row, [rows], not reduced.

    Slopes:
      the weight of a token's log-prob is A w / M times its ratio, or 0 where clipped

    References:
      Liu et al., 2025, arXiv:2503.20783, section 3.2.
    """
    tokens = _clipped_tokens(samples, old_log_prob, advantages, importance, clip, clip_high, beta)
    return jnp.sum(tokens, axis=-1) / max_tokens


def dapo(
    samples: SampleLogProbs,
    old_log_prob: Tokens,
    advantages: Rows,
    importance: Tokens | None = None,
    *,
    clip: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
) -> Tokens:
    r"""Decoupled clip policy optimisation: every token of a batch weighs the same.

    .. math:: \ell = -w_n \min(A \varrho_n, A\, \mathrm{clip}(\varrho_n, 1 - c, 1 + c_h))
                     + \beta k_3, \quad
              \varrho_n = \pi(y_n) / \pi_{old}(y_n)

    Args:
      samples: as in `grpo`.
      old_log_prob: as in `grpo`.
      advantages: as in `grpo`.
      importance: as in `grpo`.
      clip: how far a ratio may fall, in [0, 1). Default 0.2: the paper's.
      clip_high: how far it may rise, > 0. Default 0.28: the paper's.
      beta: weight of the divergence, >= 0. Default 0: the paper's.

    Returns:
      One loss per token, [rows, response], 0 at padding, not reduced.

    Slopes:
      the weight of a token's log-prob is A w times its ratio, or 0 where clipped

    References:
      Yu et al., 2025, arXiv:2503.14476, eq. 8.
    """
    return _clipped_tokens(samples, old_log_prob, advantages, importance, clip, clip_high, beta)


def gspo(
    samples: SampleLogProbs,
    old_log_prob: Tokens,
    advantages: Rows,
    importance: Tokens | None = None,
    *,
    clip: float = 3e-4,
    clip_high: float = 4e-4,
    beta: float = 0.0,
) -> Rows:
    r"""Group sequence policy optimisation: one ratio for a response, the mean over its tokens.

    .. math:: \ell = -\bar w \min(A s, A\, \mathrm{clip}(s, 1 - c, 1 + c_h)) + \beta \bar k_3, \quad
              s = \exp\Bigl(\frac{1}{L} \sum_n \log\frac{\pi(y_n)}{\pi_{old}(y_n)}\Bigr)

    Args:
      samples: as in `grpo`.
      old_log_prob: as in `grpo`.
      advantages: as in `grpo`.
      importance: as in `grpo`; its mean over the tokens weighs the response.
      clip: how far the ratio may fall, in [0, 1). Default 3e-4: the paper's.
      clip_high: how far it may rise, > 0. Default 4e-4: the paper's.
      beta: weight of the divergence, >= 0. Default 0: the paper's.

    Returns:
      One loss per row, [rows], not reduced.

    Slopes:
      the weight of every token's log-prob is A w s / L, or 0 where clipped

    References:
      Zheng et al., 2025, arXiv:2507.18071, eq. 5.
    """
    _check(clip, clip_high, beta)
    length = _lengths(samples)
    log_ratio = _log_ratio_to_old(samples, old_log_prob).sum(-1) / length
    gain = _pessimistic(jnp.exp(log_ratio), jax.lax.stop_gradient(advantages), clip, clip_high)
    weight = jnp.sum(_weights(samples, importance), axis=-1) / length
    return beta * k3_divergence(samples).sum(-1) / length - weight * gain


def cispo(
    samples: SampleLogProbs,
    old_log_prob: Tokens,
    advantages: Rows,
    importance: Tokens | None = None,
    *,
    clip_high: float = 4.0,
    beta: float = 0.0,
) -> Tokens:
    r"""Clipped importance weights: a policy gradient in which every token keeps its gradient.

    .. math:: \ell = -\mathrm{sg}\bigl[w_n \min(\varrho_n, 1 + c_h)\bigr] A \log\pi(y_n)
                     + \beta k_3, \quad
              \varrho_n = \pi(y_n) / \pi_{old}(y_n)

    Args:
      samples: as in `grpo`.
      old_log_prob: as in `grpo`.
      advantages: as in `grpo`.
      importance: as in `grpo`.
      clip_high: how far the weight may rise above 1, > 0. Default 4: the largest weight is 5, as
        in ScaleRL (arXiv:2510.13786); the paper does not give its own.
      beta: weight of the divergence, >= 0. Default 0: the paper's.

    Returns:
      One loss per token, [rows, response], 0 at padding, not reduced.

    Slopes:
      the weight of a token's log-prob is A w times its clipped ratio

    References:
      MiniMax, 2025, arXiv:2506.13585, eq. 4.
    """
    _check(0.0, clip_high, beta)
    ratio = jnp.exp(_log_ratio_to_old(samples, old_log_prob))
    weight = _weights(samples, importance) * jnp.minimum(ratio, 1 + clip_high)
    weight = jax.lax.stop_gradient(weight * advantages[:, None])
    return beta * k3_divergence(samples) - weight * samples.scored


def reinforce_pp_advantages(samples: SampleLogProbs, reward: Rows, *, beta: float = 0.01) -> Tokens:
    r"""Advantages of REINFORCE++: what follows a token, whitened over all tokens of the batch.

    .. math:: A_n = \frac{G_n - \bar G}{\sqrt{\mathrm{Var}(G)}}, \quad
              G_n = R - \beta \sum_{k \ge n} \rho_k, \quad
              \rho_k = \log\pi(y_k) - \log\pi^{ref}(y_k)

    Args:
      samples: log-probabilities under the policy that sampled and under the reference.
      reward: reward R of each response, [rows].
      beta: weight of the divergence, >= 0. Default 0.01: the authors' code (OpenRLHF).

    Returns:
      The advantages, [rows, response], 0 at padding; `ppo_policy` reads them. No gradient flows.

    References:
      Hu et al., 2025, arXiv:2501.03262, section 3.
    """
    rewards = ppo_token_rewards(samples, reward, beta=beta)
    return whiten(jnp.cumsum(rewards[:, ::-1], axis=-1)[:, ::-1], samples.mask)


def _clipped_tokens(
    samples: SampleLogProbs,
    old_log_prob: Tokens,
    advantages: Rows,
    importance: Tokens | None,
    clip: float,
    clip_high: float,
    beta: Strength,
) -> Tokens:
    """The loss of every token, 0 at padding."""
    _check(clip, clip_high, beta)
    ratio = jnp.exp(_log_ratio_to_old(samples, old_log_prob))
    gain = _pessimistic(ratio, jax.lax.stop_gradient(advantages)[:, None], clip, clip_high)
    return beta * k3_divergence(samples) - _weights(samples, importance) * gain


def _check(clip: float, clip_high: float, beta: Strength) -> None:
    non_negative(clip=clip, beta=beta)
    positive(clip_high=clip_high)
    if clip >= 1:
        raise UserError(f"clip = {clip}: must be < 1")


def _pessimistic(ratio: Array, advantages: Array, clip: float, clip_high: float) -> Array:
    """The smaller gain of the ratio and the clipped ratio."""
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip_high)
    return jnp.minimum(advantages * ratio, advantages * clipped)


def _log_ratio_to_old(samples: SampleLogProbs, old_log_prob: Tokens) -> Tokens:
    old = jnp.where(samples.mask, old_log_prob, 0.0)
    return samples.scored - jax.lax.stop_gradient(old)


def _weights(samples: SampleLogProbs, importance: Tokens | None) -> Tokens:
    """The importance weight of each token, 0 at padding."""
    if importance is None:
        return samples.mask.astype(samples.log_prob.dtype)
    return jnp.where(samples.mask, jax.lax.stop_gradient(importance), 0.0)


def _lengths(samples: SampleLogProbs) -> Rows:
    return jnp.maximum(jnp.sum(samples.mask, axis=-1), 1).astype(samples.log_prob.dtype)
