"""Preference data from models: the best of several, critique and revision, rules, a society."""

from jaxalign.collection.best_of_n import Candidates, sampled_candidates
from jaxalign.collection.constitutional import Principle, Trace, read_principles, revised
from jaxalign.collection.selection import (
    best_and_worst,
    raft_selection,
    ranked_pairs,
    rejection_sampling,
)
from jaxalign.collection.self_alignment import Aligned, Rule, read_rules, self_aligned
from jaxalign.collection.society import (
    WORLDS,
    Encounter,
    Memory,
    Society,
    comparison_data,
    society_data,
)
from jaxalign.collection.writing import PairWriter, Statistics

__all__ = [
    "WORLDS",
    "Aligned",
    "Candidates",
    "Encounter",
    "Memory",
    "PairWriter",
    "Principle",
    "Rule",
    "Society",
    "Statistics",
    "Trace",
    "best_and_worst",
    "comparison_data",
    "raft_selection",
    "ranked_pairs",
    "read_principles",
    "read_rules",
    "rejection_sampling",
    "revised",
    "sampled_candidates",
    "self_aligned",
    "society_data",
]
