"""RAHF-SCIT (arXiv:2312.15997): from a base and a preference file to an aligned model.

Command:  jaxalign train experiments/rahf/scit.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.scit(scale)
