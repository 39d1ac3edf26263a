"""The stages that predict the next token: pretraining and supervised fine-tuning."""

import dataclasses
from typing import Annotated, Literal

from jaxalign.config.fields import Sources, listed, short
from jaxalign.config.stage import StageConfig
from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig(StageConfig):
    """The pretraining stage: next-token prediction on packed text."""

    text: Annotated[tuple[str, ...], short()] = ()
    """Text files for the pretraining stage."""
    eval_text: Annotated[tuple[str, ...], short()] = ()
    """Held-out text files for the pretraining stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(StageConfig):
    """Supervised fine-tuning: next-token prediction on responses."""

    data: Annotated[Sources, short("sft-data")] = ()
    """Prompt and response records for the SFT stage, of one or several sources, as in `data`; by
    default the chosen responses."""
    responses: Annotated[Literal["chosen", "rejected", "hindsight"], short("sft-responses")] = (
        "chosen"
    )
    """Which responses of the pairs SFT imitates; hindsight: both, each under the instruction that
    it follows (HIR, arXiv:2302.05206)."""
    turns: Literal["last", "all"] = "last"
    """Which turns of a conversation SFT imitates: the response alone (last), or all turns of the
    assistant (all), the others being read and not scored."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Whether to pack responses with their prompts one after the other in long rows, instead of
    padding each to the longest of its batch (decoders; the numbers are the same, the responses of a
    batch are others); auto: on CPUs and one GPU, where it was measured, if it saves
    a tenth of the computed positions. The choice is kept in the run folder for resuming."""

    def __post_init__(self):
        listed(self, "data")


def check_supervised(stage: SupervisedConfig) -> None:
    """Check the fields that constrain each other.

    Args:
      stage: every field has its type and range.

    Raises:
      UserError: names the field.
    """
    if stage.data and stage.responses != "chosen":
        raise UserError(f"sft_responses: {stage.responses} reads pairs; leave out sft_data")
    if stage.turns == "all" and stage.responses == "hindsight":
        raise UserError("sft.turns: an instruction of hindsight is of one response; set last")
