"""Pure losses on log-probs: `loss(pairs, *, hyperparameters) -> one value per pair`."""

from jaxalign.losses.pairs import PairLogProbs

__all__ = ["PairLogProbs"]
