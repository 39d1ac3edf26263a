"""SFT on the chosen responses: the model that the other runs of this folder start from.

Command:  jaxalign train experiments/offline/sft.py [--scale paper]
Time:     about five minutes on two CPU cores
Expect:   runs/hh_sft/export
"""

from experiments.offline.human_preferences import supervised
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """One pass over the chosen responses."""
    return supervised(scale)
