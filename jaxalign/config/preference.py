"""The preference stage: its loss, its reference and its statistics of gradients."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Annotated, Literal

from jaxalign.config.fields import Count, Finite, Fraction, NonNegative, Share, Words, short
from jaxalign.config.stage import StageConfig
from jaxalign.errors import UserError
from jaxalign.losses import (
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    TOKEN_LOSSES,
    DivergenceName,
    function_name,
    members_in,
    options_by_member,
)

LOSSES = PREFERENCE_LOSSES | TOKEN_LOSSES | REWARD_LOSSES
"""The losses of the table that the stage takes, by name."""
SWITCHES = {
    "divergence": "reverse_kl",
    "log_probs": "sum",
    "tail_weight": 1.0,
    "pair_weights": "none",
    "calibration": "none",
    "logits_sam": 0.0,
}
"""Fields that act on the log-probs of pairs before any loss, or on the gradients after it, and what
does nothing."""


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

    loss: Annotated[Words, short()] = "dpo"
    """Name of a loss (`jaxalign losses` lists them), or your own: "FILE.py:FUNCTION". Several with
    weights are summed: dpo:1.0 sft:0.2; the reported rewards have the scale of the first with one.
    bradley_terry trains a reward model instead of a policy, preference_model one that reads two
    responses; both have a scalar head and no reference."""
    loss_options: Annotated[dict[str, Finite], short()] = dataclasses.field(default_factory=dict)
    """Hyperparameters of the loss that differ from its defaults, e.g. beta 0.3; in a sum, with the
    loss's name: dpo.beta 0.3."""
    reference: Annotated[Literal["auto", "live", "precomputed", "none"], short()] = "auto"
    """Computation of the reference's log-probs: in each step (live), once before the first step and
    stored (precomputed), or not at all (none). auto: none where the loss reads none (the metrics
    then have no rewards and no KL), precomputed where each pair is used more than once and the loss
    reads nothing but log-probs, else live."""
    reference_every: Annotated[Count, short()] = 0
    """Interval in steps at which the reference moves towards the policy (TR-DPO, arXiv:2404.09656);
    0: it is fixed."""
    reference_rate: Annotated[Fraction, short()] = 1.0
    """Weight of the policy when the reference moves: 1 copies the policy; a small one at an
    interval of 1 is an exponential average. Adapters (LoRA) need 1."""
    divergence: Annotated[DivergenceName, short()] = "reverse_kl"
    """Divergence that ties the policy to the reference: losses read its score of the log-ratio in
    place of the log-ratio (f-DPO, arXiv:2309.16240)."""
    divergence_alpha: Annotated[Finite, short()] = 0.5
    """Alpha of the divergence alpha; 0 is forward_kl, 1 is reverse_kl."""
    log_probs: Annotated[Literal["sum", "mean"], short()] = "sum"
    """Log-prob of a response that losses read: the sum over its tokens, or the mean; lengths are
    then 1."""
    tail_weight: Annotated[Share, short()] = 1.0
    """Weight of the tokens after the length of the pair's shorter response (alpha of LD-DPO,
    arXiv:2409.06411)."""
    pair_weights: Annotated[Literal["none", "wpo"], short()] = "none"
    """Factor on the loss of each pair: none, or how likely the policy itself is to write the two
    responses (wpo, arXiv:2406.11827)."""
    calibration: Annotated[Literal["none", "head", "all"], short()] = "none"
    """Reward calibration (arXiv:2604.18239): one factor on the gradients of all chosen responses,
    its inverse on those of rejected ones, from running averages of their norms in the output head
    (head) or in all trained parameters (all)."""
    logits_sam: Annotated[NonNegative, short()] = 0.0
    """Radius rho of logits-SAM (arXiv:2603.18258), e.g. 0.05: the gradient is taken after a step of
    that length uphill in the output head; 0: off."""
    share_prompts: Annotated[Literal["auto", "always", "never"], short()] = "auto"
    """Whether to compute the common beginning of both rows of a pair only once (decoders; the
    numbers are the same); auto: where it saves a quarter of the tokens."""
    packing: Annotated[Literal["auto", "always", "never"], short()] = "auto"
    """Whether to pack pairs one after the other in long rows, instead of padding each to the
    longest of its batch (decoders; the numbers are the same, the pairs of a batch are others);
    auto: on CPUs and one GPU, where it was measured, if it saves a tenth of the computed positions.
    The choice is kept in the run folder for resuming."""
    entanglement: Annotated[EntanglementConfig, short()] = EntanglementConfig()
    """Statistics of the gradients of chosen and rejected during the preference stage."""


def _check_options(loss: str, options: Mapping[str, float]) -> None:
    """Check a loss's name, and the names of its options if it is one of the table."""
    if loss in LOSSES:
        parameters = inspect.signature(LOSSES[loss]).parameters.values()
        known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(known)):
            raise UserError(
                f"loss_options: {loss} has no {', '.join(unknown)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    elif ":" not in loss:
        raise UserError(
            f"loss: {loss!r} is neither FILE.py:FUNCTION nor one of {', '.join(sorted(LOSSES))}"
        )


def check_preference(stage: PreferenceConfig) -> None:
    """Check the fields that constrain each other.

    Args:
      stage: every field has its type and range.

    Raises:
      UserError: names the field.
    """
    loss, settings = stage.loss, stage.entanglement
    if members := members_in(loss, LOSSES):
        own = options_by_member(stage.loss_options, [function_name(name) for name, _ in members])
        for name, _ in members:
            if name not in PREFERENCE_LOSSES and ":" not in name:
                raise UserError(
                    f"loss: {name!r} cannot be in a weighted sum; it takes FILE.py:FUNCTION and "
                    f"{', '.join(sorted(PREFERENCE_LOSSES))}"
                )
            _check_options(name, own[function_name(name)])
    else:
        _check_options(loss, stage.loss_options)
    for field in ("every", "ledger"):
        if loss in TOKEN_LOSSES and getattr(settings, field):
            raise UserError(
                f"entanglement.{field}: {loss} reads whole distributions; its gradient is not a "
                "sum of two log-probs' gradients; set 0"
            )
    if loss in TOKEN_LOSSES and settings.mask != "none":
        raise UserError(f"entanglement.mask: {loss} weighs tokens itself; set none")
    for field, idle in SWITCHES.items():
        if loss in TOKEN_LOSSES | REWARD_LOSSES and getattr(stage, field) != idle:
            raise UserError(f"{field}: {loss} reads no log-probs of whole responses; set {idle}")
    if settings.ledger and stage.tail_weight != 1.0:
        raise UserError(
            "entanglement.ledger: splits the log-probs of whole responses, not those of weighted "
            "tokens; set --tail-weight 1"
        )
    if stage.logits_sam and (settings.ledger or settings.realised):
        name = "ledger" if settings.ledger else "realised"
        raise UserError(
            f"entanglement.{name}: compares log-probs before and after an update, and those before "
            "are of the shifted head of logits-SAM; set --logits-sam 0"
        )
    if stage.calibration != "none" and settings.reweighting != "none":
        raise UserError(
            f"calibration: entanglement.reweighting {settings.reweighting} sets the gradients of "
            "each pair; set one of them"
        )
    if stage.divergence_alpha != 0.5 and stage.divergence != "alpha":
        raise UserError(f"divergence_alpha: {stage.divergence} has none; set --divergence alpha")
    if stage.reference_every and (loss in REWARD_LOSSES or stage.reference == "none"):
        raise UserError("reference_every: there is no reference to move; set 0")
    if stage.reference_every and stage.reference == "precomputed":
        raise UserError(
            "reference_every: stored log-probs cannot follow a reference that moves; set "
            "--reference live"
        )
    if stage.reference_rate != 1.0 and not stage.reference_every:
        raise UserError("reference_rate: the reference does not move; set --reference-every")
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
