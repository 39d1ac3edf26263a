"""The dispreferred model of RAHF-Dual: SFT on rejected responses.

Command:  jaxalign train experiments/rahf/rejected_sft.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.supervised(scale, "rejected", "rejected_sft")
