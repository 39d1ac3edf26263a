"""Hidden states: representation alignment (RAHF), steering vectors (RePS) and persona vectors."""

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
from jaxalign.representation.persona import (
    PersonaScores,
    TrainingRecord,
    persona_scores,
    training_records,
)
from jaxalign.representation.reps import (
    RepsOptions,
    means_difference,
    pair_log_probs,
    reps_loss,
    reps_losses,
    response_means,
    train_vector,
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
    "PersonaScores",
    "Reader",
    "RepresentationObjective",
    "RepsOptions",
    "Stimuli",
    "StimulusBatch",
    "StimulusReport",
    "Tokenization",
    "TrainingRecord",
    "contrastive_pairs",
    "default_layers",
    "hindsight_rows",
    "make_instructions",
    "means_difference",
    "pair_log_probs",
    "persona_scores",
    "pooled",
    "principal_components",
    "probe_accuracy",
    "read_patterns",
    "reps_loss",
    "reps_losses",
    "response_means",
    "responses_of",
    "separability",
    "steering",
    "stimulus_batches",
    "stimulus_positions",
    "summarise",
    "tokenize_stimuli",
    "train_vector",
    "training_records",
]
