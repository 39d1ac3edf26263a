"""The held-out reward model: of pairs that no other run reads.

Command:  jaxalign train experiments/rahf/judge.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.reward(scale, "judge")
