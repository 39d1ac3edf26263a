"""Proximal policy optimisation on tokens: rewards, advantages, and the two clipped losses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.losses.checks import non_negative, positive
from jaxalign.losses.samples import SampleLogProbs

Tokens = Float[Array, "rows response"]
TokenMask = Bool[Array, "rows response"]


def ppo_token_rewards(
    samples: SampleLogProbs, score: Float[Array, " rows"], *, beta: float = 0.05
) -> Tokens:
    r"""Reward of each token: minus its log-ratio, and the response's score at the last token.

    .. math:: R_n = -\beta \bigl(\log\pi(y_n) - \log\pi^{ref}(y_n)\bigr)
                    + s\, [n = \text{last}]

    Args:
      samples: log-probabilities under the policy that sampled and under the reference, in nats;
        every field is [rows, response].
      score: score s of each response, [rows], with any penalty for a missing end already in it.
      beta: weight of the divergence, >= 0. Default 0.05: Huang et al.'s on TL;DR.

    Returns:
      Rewards, [rows, response], 0 at padding; a row without tokens gets none. No gradient flows.

    References:
      Stiennon et al., 2020, arXiv:2009.01325; details: Huang et al., 2024, arXiv:2403.17031.
    """
    non_negative(beta=beta)
    counted = jnp.cumsum(samples.mask[:, ::-1].astype(jnp.int32), axis=-1)[:, ::-1]
    last = samples.mask & (counted == 1)
    rewards = jnp.where(last, score[:, None], 0.0) - beta * samples.log_ratio
    return jax.lax.stop_gradient(rewards)


def gae(
    rewards: Tokens, values: Tokens, mask: TokenMask, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tokens, Tokens]:
    r"""Generalised advantage estimates and returns of every token.

    .. math:: A_n = \sum_{k \ge n} (\gamma\lambda)^{k-n} \delta_k, \quad
              \delta_k = R_k + \gamma V_{k+1} - V_k, \quad
              G_n = A_n + V_n

    The value past the last token is 0, and positions outside the mask are skipped.

    Args:
      rewards: reward of each token, [rows, response].
      values: value V_n predicted before token n, [rows, response].
      mask: true at response tokens, [rows, response].
      gamma: discount, >= 0. Default 1: a response is one episode; at 0 the score at the last
        token would never reach the others.
      lam: weight lambda of long estimates against the values, >= 0. Default 0.95: the paper's
        and the usual one for language models.

    Returns:
      (advantages, returns), each [rows, response], 0 at padding. No gradient flows.

    References:
      Schulman et al., 2016, arXiv:1506.02438, eq. 16.
    """
    non_negative(gamma=gamma, lam=lam)

    def back(carry, token):
        following, advantage = carry
        reward, value, real = token
        estimate = reward + gamma * following - value + gamma * lam * advantage
        carry = jnp.where(real, value, following), jnp.where(real, estimate, advantage)
        return carry, jnp.where(real, estimate, 0.0)

    zero = jnp.zeros_like(values[:, 0])
    columns = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(back, (zero, zero), columns, reverse=True)
    returns = jnp.where(mask, advantages.T + values, 0.0)
    return jax.lax.stop_gradient((advantages.T, returns))


def whiten(x: Tokens, mask: TokenMask, *, epsilon: float = 1e-8) -> Tokens:
    r"""Values shifted and scaled to mean 0 and standard deviation 1 over the real tokens.

    .. math:: \hat x = \frac{x - \bar x}{\sqrt{\mathrm{Var}(x) + \epsilon}}

    Args:
      x: values, [rows, response].
      mask: true at response tokens, [rows, response].
      epsilon: added to the (population) variance, > 0. Default 1e-8: Huang et al.'s.

    Returns:
      Whitened values, [rows, response], 0 at padding.

    References:
      Huang et al., 2024, arXiv:2403.17031.
    """
    positive(epsilon=epsilon)
    count = jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)
    centred = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
    return centred * jax.lax.rsqrt(jnp.sum(jnp.square(centred)) / count + epsilon)


def ppo_policy(
    log_prob: Tokens,
    old_log_prob: Tokens,
    advantages: Tokens,
    mask: TokenMask,
    *,
    clip: float = 0.2,
) -> Tokens:
    r"""Clipped surrogate of the policy: no gain from moving a token's probability too far.

    .. math:: \ell = \max\bigl(-A \varrho, -A\, \mathrm{clip}(\varrho, 1 - c, 1 + c)\bigr), \quad
              \varrho = \pi(y_n) / \pi_{old}(y_n)

    Args:
      log_prob: log-probability of each token under the policy, in nats, [rows, response].
      old_log_prob: the same under the policy that sampled, [rows, response].
      advantages: advantage A of each token, [rows, response].
      mask: true at response tokens, [rows, response]; values elsewhere are never read.
      clip: half-width c of the interval of ratios, > 0. Default 0.2: the paper's.

    Returns:
      One loss per token, [rows, response], 0 at padding, not reduced. At ratio 1 it is -A.

    Slopes:
      the weight of a token's log-prob is A times its ratio, or 0 where clipped

    References:
      Schulman et al., 2017, arXiv:1707.06347, eq. 7.
    """
    positive(clip=clip)
    old_log_prob, advantages = jax.lax.stop_gradient((old_log_prob, advantages))
    ratio = jnp.exp(jnp.where(mask, log_prob, 0.0) - jnp.where(mask, old_log_prob, 0.0))
    advantages = jnp.where(mask, advantages, 0.0)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip))


def ppo_value(
    values: Tokens, old_values: Tokens, returns: Tokens, mask: TokenMask, *, clip: float = 0.2
) -> Tokens:
    r"""Clipped squared error of the value: no gain from moving a prediction too far.

    .. math:: \ell = \tfrac12 \max\bigl((V - G)^2, (\hat V - G)^2\bigr), \quad
              \hat V = \mathrm{clip}(V, V_{old} - c, V_{old} + c)

    Args:
      values: values V of the tokens, [rows, response].
      old_values: the same when the responses were sampled, [rows, response].
      returns: returns G of the tokens, [rows, response].
      mask: true at response tokens, [rows, response]; values elsewhere are never read.
      clip: half-width c of the interval around the old value, > 0. Default 0.2: Huang et al.'s.

    Returns:
      One loss per token, [rows, response], 0 at padding, not reduced.

    Slopes:
      d loss / d V = V - G, or 0 where clipped

    References:
      Huang et al., 2024, arXiv:2403.17031 (the clipped value loss of PPO's implementation).
    """
    positive(clip=clip)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    values, old_values, returns = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)) / 2
