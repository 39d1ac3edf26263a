"""The preference stage: its loss, its reference and its statistics of gradients."""

import dataclasses
import inspect
from typing import Annotated, Literal

from jaxalign.config.fields import Count, Finite, NonNegative, short
from jaxalign.config.stage import StageConfig
from jaxalign.errors import UserError
from jaxalign.losses import PREFERENCE_LOSSES, REWARD_LOSSES, TOKEN_LOSSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntanglementConfig:
    """Per-pair gradient statistics and mitigations in the preference stage (arXiv:2410.13828)."""

    every: Count = 0
    """Interval in steps at which per-pair gradient statistics are logged (exact geometry of all
    pairs, cases, coefficients); 0: never."""
    parts: bool = False
    """Whether to also log the cosine by layer and by kind of matrix."""
    reweighting: Literal["none", "normalised", "centred"] = "none"
    """Reweighting of the two gradients of each pair in every step: gradients scaled to unit norm
    (normalised), or coefficients in the centre of the disentanglement band (centred); costs one
    backward pass."""
    realised: bool = False
    """Whether to also log how far the update moved the batch's own log-probs; costs one forward
    pass."""
    preconditioned: bool = False
    """Whether to also log the geometry in AdamW's own inner product; costs two backward passes per
    pair."""
    ledger: Count = 0
    """Interval in steps at which the realised changes of the log-probs are split by where they came
    from: the pair's own gradients, the other pairs, the optimiser, curvature; 0: never. Costs a
    forward-mode pass in two directions and a forward pass, of the batch and of held-out pairs, in
    these steps; they log the statistics of `every` too."""
    mask: Literal["none", "differing", "learned"] = "none"
    """Tokens that the loss counts: all (none), those in which the two responses differ (differing),
    or all with learned weights and a penalty on the weights (learned)."""
    mask_penalty: NonNegative = 1e-3
    """Penalty of a learned mask on the sum of its weights, per pair."""
    mask_learning_rate: NonNegative = 1e-2
    """Learning rate (Adam's) of a learned mask."""

    def __post_init__(self):
        if self.reweighting != "none" and self.every != 1:
            raise UserError(
                f"entanglement.reweighting: {self.reweighting} acts in every step; "
                "set --entanglement.every 1"
            )
        if self.ledger and self.mask != "none":
            raise UserError(
                f"entanglement.ledger: splits the log-probs of whole responses, not those of mask "
                f"{self.mask}; set one of them"
            )
        if self.preconditioned and self.mask == "learned":
            raise UserError(
                "entanglement.preconditioned: does not work with mask learned; set one of them"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(StageConfig):
    """The preference stage: a loss of chosen and rejected responses."""

    loss: Annotated[str, short()] = "dpo"
    """Name of a loss (`jaxalign losses` lists them), or your own: "FILE.py:FUNCTION".
    bradley_terry trains a reward model instead of a policy, preference_model one that reads two
    responses; both have a scalar head and no reference."""
    loss_options: Annotated[dict[str, Finite], short()] = dataclasses.field(default_factory=dict)
    """Hyperparameters of the loss that differ from its defaults, e.g. beta 0.3."""
    reference: Annotated[Literal["auto", "live", "precomputed", "none"], short()] = "auto"
    """Computation of the reference's log-probs: in each step (live), once before the first step and
    stored (precomputed), or not at all (none). auto: none where the loss reads none (the metrics
    then have no rewards and no KL), precomputed where each pair is used more than once and the loss
    reads nothing but log-probs, else live."""
    share_prompts: Annotated[Literal["auto", "always", "never"], short()] = "auto"
    """Whether to compute the common beginning of both rows of a pair only once (decoders; the
    numbers are the same); auto: where it saves a quarter of the tokens."""
    packing: Annotated[Literal["auto", "always", "never"], short()] = "auto"
    """Whether to pack pairs one after the other in long rows, instead of padding each to the
    longest of its batch (decoders; the numbers are the same, the pairs of a batch are others);
    auto: on CPUs and one GPU, where it was measured, if it saves a tenth of the computed positions;
    not with per-pair statistics or a ledger in more than a quarter of the steps, which need padded
    rows. The choice is kept in the run folder for resuming."""
    entanglement: Annotated[EntanglementConfig, short()] = EntanglementConfig()
    """Statistics of the gradients of chosen and rejected during the preference stage."""


def check_preference(stage: PreferenceConfig) -> None:
    """Check the fields that constrain each other.

    Args:
      stage: every field has its type and range.

    Raises:
      UserError: names the field.
    """
    loss, settings = stage.loss, stage.entanglement
    losses = PREFERENCE_LOSSES | TOKEN_LOSSES | REWARD_LOSSES
    if loss in losses:
        parameters = inspect.signature(losses[loss]).parameters.values()
        known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
        if unknown := sorted(set(stage.loss_options) - set(known)):
            raise UserError(
                f"loss_options: {loss} has no {', '.join(unknown)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    elif ":" not in loss:
        raise UserError(
            f"loss: {loss!r} is neither FILE.py:FUNCTION nor one of {', '.join(sorted(losses))}"
        )
    for field in ("every", "ledger"):
        if loss in TOKEN_LOSSES and getattr(settings, field):
            raise UserError(
                f"entanglement.{field}: {loss} reads whole distributions; its gradient is not a "
                "sum of two log-probs' gradients; set 0"
            )
    if loss in TOKEN_LOSSES and settings.mask != "none":
        raise UserError(f"entanglement.mask: {loss} weighs tokens itself; set none")
    for field, idle in (("every", 0), ("ledger", 0), ("mask", "none")):
        if loss in REWARD_LOSSES and getattr(settings, field) != idle:
            raise UserError(
                f"entanglement.{field}: {loss} trains scores, not log-probs of responses; "
                f"set {idle}"
            )
    if settings.mask != "none" and stage.reference in ("precomputed", "none"):
        raise UserError(
            "entanglement.mask: needs the reference's token log-probs; set --reference live"
        )
    rule = stage.optimizer.name
    if settings.preconditioned and rule != "adamw":
        raise UserError(f"entanglement.preconditioned: needs the optimiser adamw, not {rule}")
