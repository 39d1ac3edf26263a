"""Hindsight instruction relabelling (arXiv:2302.05206), its supervised part.

Command:  jaxalign train experiments/rahf/hir.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.supervised(scale, "hindsight", "hir")
