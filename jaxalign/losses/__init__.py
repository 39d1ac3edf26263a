"""Pure losses on log-probs: `loss(pairs, *, hyperparameters) -> one value per pair`."""

from collections.abc import Callable

from jaxtyping import Array, Float

from jaxalign.losses.alpha_dpo import alpha_dpo
from jaxalign.losses.aot import aot
from jaxalign.losses.apo import apo_down, apo_zero
from jaxalign.losses.bco import bco
from jaxalign.losses.beta_dpo import beta_dpo
from jaxalign.losses.cal_dpo import cal_dpo
from jaxalign.losses.cpo import cpo
from jaxalign.losses.discopop import discopop
from jaxalign.losses.dpo import dpo, robust_dpo
from jaxalign.losses.dpop import dpop
from jaxalign.losses.exo import exo
from jaxalign.losses.hidden_states import (
    hidden_state_distance,
    hidden_state_matching,
    shifted_states,
)
from jaxalign.losses.ipo import ipo, ipo_mean
from jaxalign.losses.kto import kto, kto_kl, kto_unpaired
from jaxalign.losses.nca import nca
from jaxalign.losses.orpo import orpo
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.policy_gradient import (
    leave_one_out,
    nash_md_pg,
    regularised_policy_gradient,
)
from jaxalign.losses.ppo import gae, ppo_policy, ppo_token_rewards, ppo_value, whiten
from jaxalign.losses.rdpo import rdpo
from jaxalign.losses.rejected_weight import bdpo, dpo_shift, mappo, minor_dpo
from jaxalign.losses.reward import bradley_terry, preference_model
from jaxalign.losses.rpo import rpo
from jaxalign.losses.rrhf import rrhf
from jaxalign.losses.samples import SampleLogProbs
from jaxalign.losses.scit import scit, scit_mean
from jaxalign.losses.sigmoid_norm import sigmoid_norm
from jaxalign.losses.simper import simper
from jaxalign.losses.simpo import simpo
from jaxalign.losses.slic import slic, slic_norm
from jaxalign.losses.soft_labels import soft_label
from jaxalign.losses.sppo import sppo, sppo_soft
from jaxalign.losses.stable_alignment import stable_alignment, stable_alignment_rated
from jaxalign.losses.statistics import Statistics, statistics_of, with_statistics
from jaxalign.losses.supervised import sft_sequence_sum, sft_token_mean
from jaxalign.losses.tdpo import tdpo1, tdpo2
from jaxalign.losses.tokens import TokenLogProbs
from jaxalign.losses.xpo import xpo

PreferenceLoss = Callable[..., Float[Array, " pairs"]]
"""A loss: pairs and hyperparameters to one value per pair."""

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {  # the table: one line per loss
    "dpo": dpo,
    "robust_dpo": robust_dpo,
    "ipo": ipo,
    "ipo_mean": ipo_mean,
    "slic": slic,
    "slic_norm": slic_norm,
    "rdpo": rdpo,
    "simpo": simpo,
    "cpo": cpo,
    "rrhf": rrhf,
    "dpop": dpop,
    "kto": kto,
    "sppo": sppo,
    "orpo": orpo,
    "rpo": rpo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "exo": exo,
    "nca": nca,
    "bco": bco,
    "discopop": discopop,
    "cal_dpo": cal_dpo,
    "dpo_shift": dpo_shift,
    "minor_dpo": minor_dpo,
    "bdpo": bdpo,
    "mappo": mappo,
    "simper": simper,
    "beta_dpo": beta_dpo,
    "alpha_dpo": alpha_dpo,
    "aot": aot,
    "sigmoid_norm": sigmoid_norm,
    "scit": scit,
    "scit_mean": scit_mean,
    "stable_alignment": stable_alignment,
}
"""The losses on `PairLogProbs`, by name."""

CONTRASTIVE_LOSSES = frozenset({"scit", "scit_mean"})
"""Losses whose pairs are one response under two opposite instructions."""

TOKEN_LOSSES: dict[str, PreferenceLoss] = {"tdpo1": tdpo1, "tdpo2": tdpo2}
"""The losses on `TokenLogProbs`, by name."""

REWARD_LOSSES: dict[str, PreferenceLoss] = {
    "bradley_terry": bradley_terry,
    "preference_model": preference_model,
}
"""The losses on the scores of a scalar head, by name."""

BATCH_COUPLED = frozenset(name for name, loss in PREFERENCE_LOSSES.items() if statistics_of(loss))
"""Losses that take statistics from their whole batch (`Statistics`)."""

__all__ = [
    "BATCH_COUPLED",
    "CONTRASTIVE_LOSSES",
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "TOKEN_LOSSES",
    "PairLogProbs",
    "PreferenceLoss",
    "SampleLogProbs",
    "Statistics",
    "TokenLogProbs",
    "alpha_dpo",
    "aot",
    "apo_down",
    "apo_zero",
    "bco",
    "bdpo",
    "beta_dpo",
    "bradley_terry",
    "cal_dpo",
    "cpo",
    "discopop",
    "dpo",
    "dpo_shift",
    "dpop",
    "exo",
    "gae",
    "hidden_state_distance",
    "hidden_state_matching",
    "ipo",
    "ipo_mean",
    "kto",
    "kto_kl",
    "kto_unpaired",
    "leave_one_out",
    "mappo",
    "minor_dpo",
    "nash_md_pg",
    "nca",
    "orpo",
    "ppo_policy",
    "ppo_token_rewards",
    "ppo_value",
    "preference_model",
    "rdpo",
    "regularised_policy_gradient",
    "robust_dpo",
    "rpo",
    "rrhf",
    "scit",
    "scit_mean",
    "sft_sequence_sum",
    "sft_token_mean",
    "shifted_states",
    "sigmoid_norm",
    "simper",
    "simpo",
    "slic",
    "slic_norm",
    "soft_label",
    "sppo",
    "sppo_soft",
    "stable_alignment",
    "stable_alignment_rated",
    "statistics_of",
    "tdpo1",
    "tdpo2",
    "whiten",
    "with_statistics",
    "xpo",
]
