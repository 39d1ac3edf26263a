"""A reward model: one scalar for each response, Bradley and Terry's likelihood.

Command:  jaxalign train experiments/reward/reward_model.py [--scale paper]
Time:     a few minutes on two CPU cores
Expect:   the held-out numbers of the README's table
"""

from experiments.reward.true_answers import scores
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run of this kind of model; everything but the loss is the other's."""
    return scores(scale, "bradley_terry")
