"""The base of all: SFT on instructions.

Command:  jaxalign train experiments/rahf/base.py [--scale paper]
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.base(scale)
