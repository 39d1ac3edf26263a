"""Pure losses on log-probs: `loss(pairs, *, hyperparameters) -> one value per pair`."""

from jaxalign.losses.alpha_dpo import alpha_dpo as alpha_dpo
from jaxalign.losses.aot import aot as aot
from jaxalign.losses.apo import apo_down as apo_down
from jaxalign.losses.apo import apo_zero as apo_zero
from jaxalign.losses.asymmetric_dpo import bdpo as bdpo
from jaxalign.losses.asymmetric_dpo import dpo_shift as dpo_shift
from jaxalign.losses.asymmetric_dpo import mappo as mappo
from jaxalign.losses.asymmetric_dpo import minor_dpo as minor_dpo
from jaxalign.losses.band import BAND_START as BAND_START
from jaxalign.losses.band import calibrated as calibrated
from jaxalign.losses.band import update_band as update_band
from jaxalign.losses.bco import bco as bco
from jaxalign.losses.bco import bco_unpaired as bco_unpaired
from jaxalign.losses.beta_dpo import beta_dpo as beta_dpo
from jaxalign.losses.cal_dpo import cal_dpo as cal_dpo
from jaxalign.losses.cpo import cpo as cpo
from jaxalign.losses.discopop import discopop as discopop
from jaxalign.losses.divergence import Divergence as Divergence
from jaxalign.losses.divergence import DivergenceName as DivergenceName
from jaxalign.losses.dpo import dpo as dpo
from jaxalign.losses.dpo import robust_dpo as robust_dpo
from jaxalign.losses.dpop import dpop as dpop
from jaxalign.losses.egpo import egpo as egpo
from jaxalign.losses.exo import exo as exo
from jaxalign.losses.grpo import cispo as cispo
from jaxalign.losses.grpo import dapo as dapo
from jaxalign.losses.grpo import dr_grpo as dr_grpo
from jaxalign.losses.grpo import group_advantages as group_advantages
from jaxalign.losses.grpo import grpo as grpo
from jaxalign.losses.grpo import gspo as gspo
from jaxalign.losses.grpo import k3_divergence as k3_divergence
from jaxalign.losses.grpo import reinforce_pp_advantages as reinforce_pp_advantages
from jaxalign.losses.hidden_states import hidden_state_distance as hidden_state_distance
from jaxalign.losses.hidden_states import hidden_state_matching as hidden_state_matching
from jaxalign.losses.hidden_states import shifted_states as shifted_states
from jaxalign.losses.ipo import ipo as ipo
from jaxalign.losses.ipo import ipo_mean as ipo_mean
from jaxalign.losses.kto import kto as kto
from jaxalign.losses.kto import kto_kl as kto_kl
from jaxalign.losses.kto import kto_unpaired as kto_unpaired
from jaxalign.losses.kto import kto_weights as kto_weights
from jaxalign.losses.labelled import LabelledLogProbs as LabelledLogProbs
from jaxalign.losses.loss import Loss as Loss
from jaxalign.losses.loss import PreferenceLoss as PreferenceLoss
from jaxalign.losses.loss import Reads as Reads
from jaxalign.losses.mixture import function_name as function_name
from jaxalign.losses.mixture import members_in as members_in
from jaxalign.losses.mixture import members_of as members_of
from jaxalign.losses.mixture import options_by_member as options_by_member
from jaxalign.losses.mixture import weighted as weighted
from jaxalign.losses.mnpo import mnpo as mnpo
from jaxalign.losses.mnpo import past_weights as past_weights
from jaxalign.losses.nca import nca as nca
from jaxalign.losses.orpo import orpo as orpo
from jaxalign.losses.pairs import PairLogProbs as PairLogProbs
from jaxalign.losses.policy_gradient import leave_one_out as leave_one_out
from jaxalign.losses.policy_gradient import nash_md_pg as nash_md_pg
from jaxalign.losses.policy_gradient import (
    regularised_policy_gradient as regularised_policy_gradient,
)
from jaxalign.losses.ppo import gae as gae
from jaxalign.losses.ppo import ppo_policy as ppo_policy
from jaxalign.losses.ppo import ppo_token_rewards as ppo_token_rewards
from jaxalign.losses.ppo import ppo_value as ppo_value
from jaxalign.losses.ppo import whiten as whiten
from jaxalign.losses.rdpo import rdpo as rdpo
from jaxalign.losses.reward import bradley_terry as bradley_terry
from jaxalign.losses.reward import preference_model as preference_model
from jaxalign.losses.rpo import rpo as rpo
from jaxalign.losses.rrhf import rrhf as rrhf
from jaxalign.losses.samples import SampleLogProbs as SampleLogProbs
from jaxalign.losses.scit import scit as scit
from jaxalign.losses.scit import scit_mean as scit_mean
from jaxalign.losses.sigmoid_norm import sigmoid_norm as sigmoid_norm
from jaxalign.losses.simper import simper as simper
from jaxalign.losses.simpo import simpo as simpo
from jaxalign.losses.slic import slic as slic
from jaxalign.losses.slic import slic_norm as slic_norm
from jaxalign.losses.soft_labels import soft_label as soft_label
from jaxalign.losses.sppo import sppo as sppo
from jaxalign.losses.sppo import sppo_soft as sppo_soft
from jaxalign.losses.stable_alignment import stable_alignment as stable_alignment
from jaxalign.losses.stable_alignment import stable_alignment_rated as stable_alignment_rated
from jaxalign.losses.statistics import Statistics as Statistics
from jaxalign.losses.statistics import statistics_of as statistics_of
from jaxalign.losses.statistics import with_statistics as with_statistics
from jaxalign.losses.supervised import sft as sft
from jaxalign.losses.supervised import sft_sequence_sum as sft_sequence_sum
from jaxalign.losses.supervised import sft_token_mean as sft_token_mean
from jaxalign.losses.switches import NO_SWITCHES as NO_SWITCHES
from jaxalign.losses.switches import Switches as Switches
from jaxalign.losses.switches import importance_weights as importance_weights
from jaxalign.losses.tdpo import tdpo1 as tdpo1
from jaxalign.losses.tdpo import tdpo2 as tdpo2
from jaxalign.losses.tokens import TokenLogProbs as TokenLogProbs
from jaxalign.losses.xpo import xpo as xpo

LOSSES: tuple[Loss, ...] = (  # the table: one entry per loss
    Loss(dpo, "pairs"),
    Loss(robust_dpo, "pairs"),
    Loss(ipo, "pairs"),
    Loss(ipo_mean, "pairs"),
    Loss(slic, "policy_pairs"),
    Loss(slic_norm, "pairs"),
    Loss(rdpo, "pairs"),
    Loss(simpo, "policy_pairs"),
    Loss(cpo, "policy_pairs"),
    Loss(rrhf, "policy_pairs"),
    Loss(dpop, "pairs"),
    Loss(kto, "pairs"),
    Loss(sppo, "pairs"),
    Loss(orpo, "policy_pairs"),
    Loss(rpo, "pairs"),
    Loss(apo_zero, "pairs"),
    Loss(apo_down, "pairs"),
    Loss(exo, "pairs"),
    Loss(nca, "pairs"),
    Loss(bco, "pairs"),
    Loss(discopop, "pairs"),
    Loss(cal_dpo, "pairs"),
    Loss(dpo_shift, "pairs"),
    Loss(minor_dpo, "pairs"),
    Loss(bdpo, "pairs"),
    Loss(mappo, "pairs"),
    Loss(simper, "policy_pairs"),
    Loss(beta_dpo, "pairs"),
    Loss(alpha_dpo, "pairs"),
    Loss(aot, "pairs"),
    Loss(sigmoid_norm, "pairs"),
    Loss(scit, "policy_pairs", contrastive=True),
    Loss(scit_mean, "policy_pairs", contrastive=True),
    Loss(stable_alignment, "policy_pairs"),
    Loss(sft, "policy_pairs"),
    Loss(tdpo1, "tokens"),
    Loss(tdpo2, "tokens"),
    Loss(soft_label, "samples"),
    Loss(xpo, "samples"),
    Loss(sppo_soft, "samples"),
    Loss(egpo, "samples"),
    Loss(mnpo, "samples"),
    Loss(nash_md_pg, "samples"),
    Loss(regularised_policy_gradient, "samples"),
    Loss(grpo, "samples"),
    Loss(dr_grpo, "samples"),
    Loss(dapo, "samples"),
    Loss(gspo, "samples"),
    Loss(cispo, "samples"),
    Loss(ppo_policy, "samples"),
    Loss(ppo_value, "samples"),
    Loss(hidden_state_matching, "states"),
    Loss(hidden_state_distance, "states"),
    Loss(kto_unpaired, "labelled"),
    Loss(bco_unpaired, "labelled"),
    Loss(stable_alignment_rated, "responses"),
    Loss(bradley_terry, "scores"),
    Loss(preference_model, "scores"),
    Loss(sft_token_mean, "responses"),
    Loss(sft_sequence_sum, "responses"),
)
"""Every loss, and what it reads."""


def losses_that_read(*reads: Reads) -> dict[str, PreferenceLoss]:
    """The losses of the table that read one of these, by name."""
    return {loss.name: loss.function for loss in LOSSES if loss.reads in reads}


PREFERENCE_LOSSES = losses_that_read("pairs", "policy_pairs")
"""The losses on `PairLogProbs`, by name."""
TOKEN_LOSSES = losses_that_read("tokens")
"""The losses on `TokenLogProbs`, by name."""
REWARD_LOSSES = losses_that_read("scores")
"""The losses on the scores of a scalar head, by name."""
LABELLED_LOSSES = losses_that_read("labelled")
"""The losses on `LabelledLogProbs`, by name."""
CONTRASTIVE_LOSSES = frozenset(loss.name for loss in LOSSES if loss.contrastive)
"""Losses whose pairs are one response under two opposite instructions."""
BATCH_COUPLED = frozenset(
    loss.name for loss in LOSSES if loss.coupled and loss.name in PREFERENCE_LOSSES
)
"""Losses on `PairLogProbs` that take statistics from their whole batch (`Statistics`)."""
