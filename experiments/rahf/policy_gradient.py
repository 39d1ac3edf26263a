"""The regularised policy gradient, where the paper has PPO.

Command:  jaxalign train experiments/rahf/policy_gradient.py [--scale paper]
Needs:    After base and reward.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.policy_gradient(scale)
