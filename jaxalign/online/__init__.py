"""Online preference optimisation: sample, annotate, update."""

from jaxalign.online.algorithm import Algorithm, Draw
from jaxalign.online.algorithms import ALGORITHMS
from jaxalign.online.objective import OnlineObjective
from jaxalign.online.rollouts import PromptBatch, Rollout, RolloutBatch

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Draw",
    "OnlineObjective",
    "PromptBatch",
    "Rollout",
    "RolloutBatch",
]
