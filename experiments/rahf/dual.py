"""RAHF-Dual (arXiv:2312.15997): the difference of two models, fitted to the preferred one.

Command:  jaxalign train experiments/rahf/dual.py [--scale paper]
Needs:    After preferred_sft and rejected_sft.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.dual(scale)
