"""KTO (arXiv:2402.01306), its paired form, from the SFT model of this folder.

Command:  jaxalign train experiments/offline/kto.py [--scale paper]
Time:     under ten minutes on two CPU cores
Expect:   the held-out reward accuracy of the README's table
"""

from experiments.offline.human_preferences import preference
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The run of this method; everything but the loss is the others'."""
    return preference(scale, "kto", {"beta": 0.1})
