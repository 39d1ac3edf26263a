"""Exact preference games with few actions: equilibria and learning policies."""

from jaxalign.games.equilibrium import (
    best_response,
    divergence,
    duality_gap,
    equilibrium,
    mixture,
)
from jaxalign.games.learning import (
    Algorithm,
    contrastive,
    expected_loss,
    extragradient,
    learn,
    policy_gradient,
    reward_gradient,
    sampled_loss,
)
from jaxalign.games.mirror_descent import mirror_descent
from jaxalign.games.preferences import (
    GAMES,
    antisymmetric,
    bradley_terry,
    cycle,
    random_preferences,
)
from jaxalign.games.tabular import (
    Game,
    fixed,
    game,
    log_mixture,
    pair_log_probs,
    sample_log_probs,
    self_play,
)

__all__ = [
    "GAMES",
    "Algorithm",
    "Game",
    "antisymmetric",
    "best_response",
    "bradley_terry",
    "contrastive",
    "cycle",
    "divergence",
    "duality_gap",
    "equilibrium",
    "expected_loss",
    "extragradient",
    "fixed",
    "game",
    "learn",
    "log_mixture",
    "mirror_descent",
    "mixture",
    "pair_log_probs",
    "policy_gradient",
    "random_preferences",
    "reward_gradient",
    "sample_log_probs",
    "sampled_loss",
    "self_play",
]
