"""Preferred-SFT, and the preferred model of RAHF-Dual.

Command:  jaxalign train experiments/rahf/preferred_sft.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.supervised(scale, "chosen", "preferred_sft")
