"""TFDS builders of preference sets, written as ArrayRecord: TensorFlow is never needed."""

from jaxalign.data.builders.hh_rlhf import HhRlhf
from jaxalign.data.builders.preference_files import PreferenceFiles
from jaxalign.data.builders.prepare import prepare
from jaxalign.data.builders.tldr_comparisons import TldrComparisons
from jaxalign.data.builders.ultrafeedback_binarized import UltrafeedbackBinarized

__all__ = ["HhRlhf", "PreferenceFiles", "TldrComparisons", "UltrafeedbackBinarized", "prepare"]
