"""IPO-MD (arXiv:2403.08635): IPO on samples of the geometric mixture of policy and reference.

Command:  jaxalign train experiments/ipo_md/ipo_md.py [--scale paper]
          ... --model FOLDER --rollout.prompts FILE.jsonl --rollout.annotator reward:FOLDER
Time:     a few minutes on two CPU cores as it stands, after `python -m
          experiments.ipo_md.summarisation` has made its prompts and its preference model
Expect:   a win rate against the reference above one half on held-out prompts, and what it cost in
          divergence
"""

from experiments.ipo_md.online import online
from jaxalign.config import TrainConfig


def config(scale: str) -> TrainConfig:
    """The paper's hyperparameters; any other algorithm by --rollout.algorithm."""
    options = {"tau": 0.3, "beta": 0.125} if scale == "tiny" else None
    return online(scale, "ipo_md", options)
