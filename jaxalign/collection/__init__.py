"""Preference data from models: the best of several, critique and revision, a society of agents."""

from jaxalign.collection.best_of_n import Candidates, sampled_candidates
from jaxalign.collection.constitutional import Principle, Trace, read_principles, revised
from jaxalign.collection.selection import (
    best_and_worst,
    raft_selection,
    ranked_pairs,
    rejection_sampling,
)
from jaxalign.collection.society import Encounter, Society, society_data
from jaxalign.collection.writing import PairWriter, Statistics

__all__ = [
    "Candidates",
    "Encounter",
    "PairWriter",
    "Principle",
    "Society",
    "Statistics",
    "Trace",
    "best_and_worst",
    "raft_selection",
    "ranked_pairs",
    "read_principles",
    "rejection_sampling",
    "revised",
    "sampled_candidates",
    "society_data",
]
