"""SFT on instructions: where every other run of this folder begins.

Command:  jaxalign train experiments/rahf/instruction_sft.py [--scale paper]
Time:     a few minutes on two CPU cores
"""

from experiments.rahf import methods
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run."""
    return methods.instruction_sft(scale)
