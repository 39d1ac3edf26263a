"""Preference data from models: best of n, critique and revision, rules, a simulated society."""

from jaxalign.collection.best_of_n import BestOfN, Candidates, sampled_candidates
from jaxalign.collection.collecting import Collected, Collection, Method, collect
from jaxalign.collection.constitutional import (
    Constitutional,
    Principle,
    Trace,
    read_principles,
    revised,
)
from jaxalign.collection.selection import (
    best_and_worst,
    raft_selection,
    ranked_pairs,
    rejection_sampling,
)
from jaxalign.collection.self_alignment import (
    Aligned,
    Rule,
    SelfAlignment,
    read_rules,
    self_aligned,
)
from jaxalign.collection.society import WORLDS, Encounter, Memory, Society
from jaxalign.collection.society_data import SimulatedSociety, comparison_data, society_data
from jaxalign.collection.writing import PairWriter, Statistics

__all__ = [
    "WORLDS",
    "Aligned",
    "BestOfN",
    "Candidates",
    "Collected",
    "Collection",
    "Constitutional",
    "Encounter",
    "Memory",
    "Method",
    "PairWriter",
    "Principle",
    "Rule",
    "SelfAlignment",
    "SimulatedSociety",
    "Society",
    "Statistics",
    "Trace",
    "best_and_worst",
    "collect",
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
