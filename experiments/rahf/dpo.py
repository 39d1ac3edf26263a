"""DPO (arXiv:2305.18290) from the base of this folder.

Command:  jaxalign train experiments/rahf/dpo.py [--scale paper]
Needs:    After base.
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.dpo(scale)
