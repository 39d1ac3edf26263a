"""Proximal policy optimisation with a critic (Schulman et al., 2017, arXiv:1707.06347)."""

from jaxtyping import Array, Float

from jaxalign.losses import (
    SampleLogProbs,
    gae,
    ppo_policy,
    ppo_token_rewards,
    ppo_value,
    whiten,
)
from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.rollouts import Rollout


def ppo(
    *,
    kl_penalty: float = 0.05,
    clip: float = 0.2,
    value_weight: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
    updates: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    r"""Clipped surrogate plus the critic's clipped error, averaged over tokens.

    .. math:: \ell = \ell_{policy} + c_V \ell_{value}

    The penalty on the divergence is in the rewards of tokens, whose advantages are computed once
    for all updates of a rollout and whitened over its tokens. Defaults are Huang et al.'s on TL;DR
    (arXiv:2403.17031) unless stated otherwise.

    Args:
      kl_penalty: weight of the divergence from the reference in the rewards. Default 0.05.
      clip: how far a token's probability and a value may move. Default 0.2: the paper's.
      value_weight: weight c_V of the critic's loss. Default 0.1.
      gamma: discount of later rewards. Default 1.
      lam: decay of the advantage estimates. Default 0.95.
      updates: number of passes over each rollout. Default 4.
      minibatches: number of parts of a rollout, with one update each. Default 1.
    """

    def advantages(
        samples: SampleLogProbs,
        reward: Float[Array, " rows"],
        values: Float[Array, "rows response"],
    ) -> tuple[Array, Array]:
        rewards = ppo_token_rewards(samples, reward, beta=kl_penalty)
        advantage, returns = gae(rewards, values, samples.mask, gamma=gamma, lam=lam)
        return whiten(advantage, samples.mask), returns

    def of_rollout(rollout: Rollout) -> Float[Array, " prompts"]:
        batch, mask = rollout.batch, rollout.mask[:, 0]
        assert rollout.values is not None
        assert batch.advantage is not None
        assert batch.sampled_log_prob is not None
        assert batch.value is not None
        assert batch.returns is not None
        tokens = ppo_policy(
            rollout.log_prob[:, 0],
            batch.sampled_log_prob[:, 0],
            batch.advantage[:, 0],
            mask,
            clip=clip,
        ) + value_weight * ppo_value(
            rollout.values[:, 0], batch.value[:, 0], batch.returns[:, 0], mask, clip=clip
        )
        return tokens.sum(-1)

    return Algorithm(
        draws=(Draw(),),
        loss=of_rollout,
        annotation="rewards",
        trained=1,
        updates=updates,
        minibatches=minibatches,
        per_token=True,
        advantages=advantages,
    )
