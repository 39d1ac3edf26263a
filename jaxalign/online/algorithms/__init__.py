"""The table of online algorithms: functions from hyperparameters to an `Algorithm`."""

from collections.abc import Callable

from jaxalign.online.algorithm import Algorithm
from jaxalign.online.algorithms.contrastive import ipo_md, online_dpo, online_ipo, online_slic
from jaxalign.online.algorithms.egpo import egpo
from jaxalign.online.algorithms.grpo import cispo, dapo, dr_grpo, grpo, gspo, reinforce_pp
from jaxalign.online.algorithms.inpo import inpo
from jaxalign.online.algorithms.mnpo import mnpo
from jaxalign.online.algorithms.nash_md import nash_ema_pg, nash_md_pg, self_play_pg
from jaxalign.online.algorithms.policy_gradient import regularised_policy_gradient, rloo
from jaxalign.online.algorithms.ppo import ppo
from jaxalign.online.algorithms.spin import spin
from jaxalign.online.algorithms.sppo import sppo
from jaxalign.online.algorithms.xpo import xpo

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {  # one line per algorithm
    "ipo_md": ipo_md,
    "online_ipo": online_ipo,
    "online_dpo": online_dpo,
    "online_slic": online_slic,
    "nash_md_pg": nash_md_pg,
    "self_play_pg": self_play_pg,
    "nash_ema_pg": nash_ema_pg,
    "regularised_policy_gradient": regularised_policy_gradient,
    "rloo": rloo,
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce_pp": reinforce_pp,
    "xpo": xpo,
    "sppo": sppo,
    "spin": spin,
    "inpo": inpo,
    "mnpo": mnpo,
    "egpo": egpo,
}
"""Name -> function from hyperparameters to an `Algorithm`."""

__all__ = ["ALGORITHMS"]
