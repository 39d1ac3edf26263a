"""Representation alignment (RAHF): instructions, activity patterns, and fitting a model to them."""

from jaxalign.representation.batches import StimulusBatch, stimulus_batches, stimulus_positions
from jaxalign.representation.instructions import (
    INSTRUCTIONS,
    Instructions,
    default_layers,
    make_instructions,
)
from jaxalign.representation.objective import MatchedStates, RepresentationObjective
from jaxalign.representation.patterns import (
    Patterns,
    PatternSummary,
    Reader,
    pooled,
    read_patterns,
    steering,
    summarise,
)
from jaxalign.representation.separability import (
    principal_components,
    probe_accuracy,
    separability,
)
from jaxalign.representation.stimuli import (
    Stimuli,
    StimulusReport,
    Tokenization,
    contrastive_pairs,
    hindsight_rows,
    responses_of,
    tokenize_stimuli,
)

__all__ = [
    "INSTRUCTIONS",
    "Instructions",
    "MatchedStates",
    "PatternSummary",
    "Patterns",
    "Reader",
    "RepresentationObjective",
    "Stimuli",
    "StimulusBatch",
    "StimulusReport",
    "Tokenization",
    "contrastive_pairs",
    "default_layers",
    "hindsight_rows",
    "make_instructions",
    "pooled",
    "principal_components",
    "probe_accuracy",
    "read_patterns",
    "responses_of",
    "separability",
    "steering",
    "stimulus_batches",
    "stimulus_positions",
    "summarise",
    "tokenize_stimuli",
]
