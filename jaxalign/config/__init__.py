"""Configs: frozen dataclasses of plain values, checked when built, stored as JSON.

`TrainConfig` is a run; each kind of stage has a config with its own fields.
"""

from jaxalign.config.feedback import FeedbackConfig
from jaxalign.config.fields import (
    AtLeastOne,
    BelowOne,
    Count,
    Field,
    Finite,
    Fraction,
    NonNegative,
    Parts,
    Positive,
    Range,
    Seed,
    Share,
    Words,
    check,
    fields_of,
    with_fields,
)
from jaxalign.config.model import ArchitectureConfig, LoraConfig, MeshConfig
from jaxalign.config.online import JudgeConfig, OnlineConfig, RolloutConfig
from jaxalign.config.preference import EntanglementConfig, PreferenceConfig
from jaxalign.config.representation import AlignmentConfig, RepresentationConfig
from jaxalign.config.run import TrainConfig
from jaxalign.config.stage import OptimizerConfig, StageConfig
from jaxalign.config.stored import from_json, read_config, to_json
from jaxalign.config.text import PretrainingConfig, SupervisedConfig

__all__ = [
    "AlignmentConfig",
    "ArchitectureConfig",
    "AtLeastOne",
    "BelowOne",
    "Count",
    "EntanglementConfig",
    "FeedbackConfig",
    "Field",
    "Finite",
    "Fraction",
    "JudgeConfig",
    "LoraConfig",
    "MeshConfig",
    "NonNegative",
    "OnlineConfig",
    "OptimizerConfig",
    "Parts",
    "Positive",
    "PreferenceConfig",
    "PretrainingConfig",
    "Range",
    "RepresentationConfig",
    "RolloutConfig",
    "Seed",
    "Share",
    "StageConfig",
    "SupervisedConfig",
    "TrainConfig",
    "Words",
    "check",
    "fields_of",
    "from_json",
    "read_config",
    "to_json",
    "with_fields",
]
