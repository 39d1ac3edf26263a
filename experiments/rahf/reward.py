"""The reward model that the policy gradient maximises.

Command:  jaxalign train experiments/rahf/reward.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.reward(scale, "reward")
