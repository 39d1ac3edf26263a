"""A pairwise preference model (arXiv:2312.00886): it reads both responses, in both orders.

Command:  jaxalign train experiments/reward/preference_model.py [--scale paper]
Time:     a few minutes on two CPU cores
Expect:   the held-out numbers of the README's table
"""

from experiments.reward.true_answers import scores
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run of this kind of model; everything but the loss is the other's."""
    return scores(scale, "preference_model")
