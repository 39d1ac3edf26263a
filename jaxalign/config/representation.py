"""The representation stage: stimuli, layers and adapters."""

import dataclasses
from typing import Annotated, Literal

from jaxalign.config.fields import AtLeastOne, Count, Finite, short
from jaxalign.config.model import LoraConfig
from jaxalign.config.stage import StageConfig
from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Representation alignment (RAHF, arXiv:2312.15997): stimuli, layers and the fit to them."""

    method: Literal["scit", "dual"] = "scit"
    """Contrast of preferred and dispreferred: one model with two instructions (scit), or two models
    (dual)."""
    instructions: Literal["paper", "short"] = "paper"
    """Wording of the two instructions; "short" for models with a short context."""
    positive: str | None = None
    """Text that replaces the positive instruction."""
    negative: str | None = None
    """Text that replaces the negative instruction."""
    positive_model: str | None = None
    """dual: folder of the model tuned on chosen responses; None: the base itself."""
    negative_model: str | None = None
    """dual: folder of the model tuned on rejected responses."""
    layers: tuple[Count, ...] = ()
    """Hidden states to fit (0: embeddings, l: output of block l - 1); empty: the paper's, every
    second of 10 to 18 (dual: 20) of 32, scaled to the depth."""
    alpha: Finite = 5.0
    """Multiple of the difference of hidden states that is added to the target; 5 in the paper."""
    positions: AtLeastOne | None = None
    """Number of tokens of a response, from the first, that are fitted; None: the paper's, 512
    (dual: 64)."""
    responses: Literal["chosen", "rejected", "both", "random"] | None = None
    """Responses of a pair that are read; None: the paper's, one at random (dual: both)."""
    distance: Literal["squared", "norm"] = "squared"
    """Distance to the target: the squared norm, as in the paper, or the norm, as in its released
    code."""
    lora: LoraConfig = LoraConfig(rank=8, dropout=0.05, targets=("q", "v"))
    """Adapters that are fitted and merged at the end of the stage; the paper's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationConfig(StageConfig):
    """The representation stage: responses per update are its batch size."""

    packing: Literal["auto", "always", "never"] = "auto"
    """Whether to pack responses with their prompts, and their stimuli, one after the other in long
    rows, instead of padding each to the longest of its batch (the numbers are the same, the
    responses of a batch are others); auto: on CPUs, where it was measured, if it saves a tenth of
    the computed positions. The choice is kept in the run folder for resuming."""
    alignment: Annotated[AlignmentConfig, short()] = AlignmentConfig()
    """Stimuli, layers and adapters; its instructions are also those of --sft-responses hindsight
    and of the losses scit and scit_mean."""


def check_representation(stage: RepresentationConfig) -> None:
    """Check the fields that constrain each other.

    Args:
      stage: every field has its type and range.

    Raises:
      UserError: names the field.
    """
    alignment = stage.alignment
    if alignment.lora.rank < 1:
        raise UserError("alignment.lora.rank: 0, but this stage trains adapters; use 8")
    if alignment.lora.weights != "float32":
        raise UserError(
            f"alignment.lora.weights: {alignment.lora.weights} is not implemented for this stage; "
            "set float32"
        )
    if stage.runs and alignment.method == "dual" and alignment.negative_model is None:
        raise UserError(
            "alignment.negative_model: dual compares two models; name the folder of the one "
            "that was tuned with --sft-responses rejected"
        )
