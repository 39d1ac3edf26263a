"""The feedback stage: single responses, each labelled desirable or not."""

import dataclasses
import inspect
from typing import Literal

from jaxalign.config.fields import Finite, Sources, listed
from jaxalign.config.stage import StageConfig
from jaxalign.errors import UserError
from jaxalign.losses import LABELLED_LOSSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig(StageConfig):
    """The feedback stage: a loss of single responses; responses per update are its batch size."""

    loss: str = "kto_unpaired"
    """Name of a loss of single responses (`jaxalign losses` lists them), or your own:
    "FILE.py:FUNCTION", a function of `LabelledLogProbs`."""
    loss_options: dict[str, Finite] = dataclasses.field(default_factory=dict)
    """Hyperparameters of the loss that differ from its defaults, e.g. beta 0.3."""
    data: Sources = ()
    """Labelled responses {prompt, response or completion, label or score}, of one or several
    sources, as in the run's `data`; by default both responses of every pair of the run."""
    eval_data: Sources = ()
    """Held-out labelled responses; by default those of a fraction `holdout` of the prompts."""
    threshold: Finite | None = None
    """Smallest number that is a desirable label; None: labels are true or false, 1 or 0."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Whether to pack responses with their prompts one after the other in long rows, instead of
    padding each to the longest of its batch (decoders; the numbers are the same, the responses of a
    batch are others); auto: on CPUs and one GPU, where it was measured, if it saves
    a tenth of the computed positions. The choice is kept in the run folder for resuming."""
    balance: Literal["auto", "none"] = "auto"
    """Weights of unequally many labels, for KTO where `loss_options` sets neither: by the paper's
    rule (auto), or 1 (none)."""

    def __post_init__(self):
        listed(self, "data", "eval_data")


def check_feedback(stage: FeedbackConfig) -> None:
    """Check the fields that constrain each other.

    Args:
      stage: every field has its type and range.

    Raises:
      UserError: names the field.
    """
    if stage.loss in LABELLED_LOSSES:
        parameters = inspect.signature(LABELLED_LOSSES[stage.loss]).parameters.values()
        known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
        if unknown := sorted(set(stage.loss_options) - set(known)):
            raise UserError(
                f"feedback.loss_options: {stage.loss} has no {', '.join(unknown)}; "
                f"it has {', '.join(known)}"
            )
    elif ":" not in stage.loss:
        raise UserError(
            f"feedback.loss: {stage.loss!r} is neither FILE.py:FUNCTION nor one of "
            f"{', '.join(sorted(LABELLED_LOSSES))}"
        )
