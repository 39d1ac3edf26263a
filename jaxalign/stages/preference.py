"""Preferences: a loss of chosen and rejected responses (DPO and its family)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxalign.config import PreferenceConfig, TrainConfig
from jaxalign.data import PairBatch, TokenizedPairs
from jaxalign.entanglement.masks import initial_head
from jaxalign.entanglement.reweighting import REWEIGHTINGS
from jaxalign.errors import UserError
from jaxalign.files import digest
from jaxalign.losses import Divergence, Switches
from jaxalign.losses.lookup import check_switches, find_loss
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.representation import contrastive_pairs
from jaxalign.sharding import shard_batch
from jaxalign.stages import parts
from jaxalign.stages.inputs import INPUTS, Inputs, TokenizedData, joint_share
from jaxalign.stages.kind import Kind, RunContext
from jaxalign.stages.ledger import with_ledger
from jaxalign.stages.packing import with_packing
from jaxalign.stages.structs import pair_batch, record_of, struct
from jaxalign.training.evaluation import Evaluation, evaluate_preferences
from jaxalign.training.masking import HEAD, MaskedPreferenceObjective, whole_responses
from jaxalign.training.moving_reference import MovingReference
from jaxalign.training.objectives import (
    Policy,
    PreferenceObjective,
    ReferencedBatch,
    TokenPreferenceObjective,
)
from jaxalign.training.optimizers import preconditioner, with_rule
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.reference import precompute_reference
from jaxalign.training.stage import Feed, Params, Rows, Stage, Step

NAME, NUMBER = "preference", 3
LEDGER_PASSES = 6
"""Forward passes that a ledger costs: products in two directions, 5, and one after the update."""

Objective = PreferenceObjective | TokenPreferenceObjective


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that trains a policy with a preference loss."""
    settings, adapters = config.preference, parts.run_adapters(config)
    objective = make_objective(config, parts.make_policy(config, model_config, adapters))
    has_mask, with_rules = learns_mask(config), {}
    if has_mask:
        rate = settings.entanglement.mask_learning_rate
        with_rules = {"with_rules": functools.partial(with_rule, HEAD, rate)}
    moving = moving_reference(settings, objective)
    fields = parts.plain_stage(settings, objective, moving=moving, **with_rules)
    trained = parts.trained_parameters(adapters, parts.key_of(config, NUMBER))

    def with_mask(params: Params) -> Params:
        head = initial_head(model_config.width, model_config.vocab_size)
        return {**trained(params), HEAD: head}

    def probed(ledger: bool) -> Step:
        probe = make_probe(config, objective, ledger=ledger)
        return parts.plain_step(
            settings, objective, fields["optimizer"], backward=probe, moving=moving
        )

    statistics = settings.entanglement
    frozen = parts.no_reference(adapters)
    if has_reference(objective) and moving is None:
        narrow = config.dtype == "bfloat16" and isinstance(model_config, DecoderConfig)
        frozen = parts.with_reference(adapters, config.dtype if narrow else None)
    return Stage(
        name=NAME,
        method=settings.loss,
        rows=f"pairs of 2 x {config.max_length:,} tokens",
        **fields,
        probed_step=probed(False) if statistics.every else None,
        probe_every=statistics.every,
        ledger_step=probed(True) if statistics.ledger else None,
        ledger_every=statistics.ledger,
        running=objective.start if isinstance(objective, PreferenceObjective) else {},
        trained=with_mask if has_mask else trained,
        moving=moving,
        frozen=frozen,
        kept=parts.without([HEAD] if has_mask else []),
        largest_batch=functools.partial(largest_batch, config, objective),
    )


def make_objective(config: TrainConfig, policy: Policy) -> Objective:
    """The objective of the stage.

    Raises:
      UserError: the loss needs a reference that the config switches off.
    """
    settings = config.preference
    options = dict(settings.loss_options)
    loss = find_loss(settings.loss, settings.loss_options)
    if loss.reads == "tokens":
        if settings.reference in ("precomputed", "none"):
            raise UserError(
                f"reference: {settings.loss} reads the reference's whole distribution at every "
                "token; set --reference live"
            )
        return TokenPreferenceObjective(policy=policy, loss=loss.function, options=options)
    switches = switches_of(settings)
    check_switches(loss, options, switches)
    mask = settings.entanglement.mask
    if mask == "none":
        needed = loss.needs_reference
        if needed and settings.reference == "none":
            raise UserError(
                f"reference: {settings.loss} reads the reference's log-probs; set --reference auto"
            )
        return PreferenceObjective(
            policy=policy,
            loss=loss.function,
            options=options,
            coupled=loss.coupled,
            has_reference=needed or settings.reference in ("live", "precomputed"),
            switches=switches,
        )
    return MaskedPreferenceObjective(
        policy=policy,
        loss=loss.function,
        options=options,
        coupled=loss.coupled,
        penalty=settings.entanglement.mask_penalty if mask == "learned" else 0.0,
        switches=switches,
    )


def switches_of(settings: PreferenceConfig) -> Switches:
    """What the stage does to log-probs before the loss."""
    return Switches(
        divergence=Divergence(settings.divergence, settings.divergence_alpha),
        log_probs=settings.log_probs,
        tail_weight=settings.tail_weight,
        importance=settings.pair_weights == "wpo",
        calibration=settings.calibration,
        logits_sam=settings.logits_sam,
    )


def moving_reference(settings: PreferenceConfig, objective: Objective) -> MovingReference | None:
    """The reference that follows the policy; None: it is fixed.

    Raises:
      UserError: the loss reads no reference.
    """
    if not settings.reference_every:
        return None
    if not has_reference(objective):
        raise UserError(
            f"reference_every: {settings.loss} reads no reference; set 0, or --reference live for "
            "the metrics"
        )
    return MovingReference(
        policy=objective.policy, every=settings.reference_every, rate=settings.reference_rate
    )


def learns_mask(config: TrainConfig) -> bool:
    """Whether a token mask is trained with the policy."""
    return config.preference.entanglement.mask == "learned"


def make_probe(config: TrainConfig, objective: Any, *, ledger: bool) -> PairProbe:
    """The probe of per-pair gradient statistics, with or without a ledger."""
    settings, rule = config.preference.entanglement, config.preference.optimizer
    of_state = functools.partial(preconditioner, b2=rule.b2, eps=rule.eps)
    return PairProbe(
        objective=objective,
        parts=settings.parts,
        reweighting=REWEIGHTINGS.get(settings.reweighting),
        realised=settings.realised,
        preconditioner=of_state if settings.preconditioned else None,
        ledger=ledger,
    )


def has_reference(objective: Objective) -> bool:
    """Whether an objective's loss or metrics read the reference."""
    return not isinstance(objective, PreferenceObjective) or objective.has_reference


def keeps_reference_live(config: TrainConfig, objective: Objective, pairs: int) -> bool:
    """Whether each step computes the reference's log-probs, instead of once before the first step.

    Args:
      config: of the run.
      objective: of the stage; one that reads more than log-probs needs a live reference.
      pairs: number of training pairs; precomputing is less work if each is used more than once.
    """
    settings = config.preference
    if settings.reference_every:
        return True
    if settings.reference != "auto":
        return settings.reference == "live"
    masked = isinstance(objective, MaskedPreferenceObjective)
    reads_more = masked or not isinstance(objective, PreferenceObjective)
    return reads_more or settings.steps * settings.batch_size <= pairs


def largest_batch(
    config: TrainConfig, objective: Objective, platform: str, response: int | None
) -> tuple[Any, list[Rows]]:
    """Shapes of the largest batch of pairs, and the passes of a step on it.

    Its rows are padded. The lengths of packed rows depend on the data; they take less, also those
    of probed steps.
    """
    del platform
    settings, response = config.preference, response or config.max_length
    pairs, rows = largest_pairs(config, objective.policy.config, response, scored=response)
    # auto counts as live: the number of pairs is not known yet
    live = has_reference(objective) and settings.reference != "precomputed"
    twice = objective.coupled and settings.micro_batches > 1  # the statistic, then the gradient
    statistics = settings.entanglement
    realised = (statistics.every > 0 or statistics.ledger > 0) and statistics.realised
    stored = has_reference(objective) and not live
    known = struct(settings.batch_size, 2, dtype=jnp.float32) if stored else None
    batch = record_of(ReferencedBatch, pairs=pairs, reference=known)
    passes = [Rows(**rows, forward=1 + live + twice + realised, backward=1)]
    passes += extra_passes(settings, rows)
    if statistics.ledger:  # of the batch and of held-out pairs
        passes += 2 * [Rows(**rows, forward=LEDGER_PASSES)]
    return batch, passes


def extra_passes(settings: PreferenceConfig, rows: dict[str, int]) -> list[Rows]:
    """The passes that the switches of gradients add."""
    passes = []
    if settings.calibration != "none":
        of_head = settings.calibration == "head"
        passes.append(Rows(**rows, forward=1, backward=0 if of_head else 2))
    if settings.logits_sam:
        passes.append(Rows(**rows, forward=1))
    return passes


def largest_pairs(
    config: TrainConfig, model_config: ModelConfig, response: int, *, scored: int
) -> tuple[PairBatch, dict[str, int]]:
    """Shapes of the largest batch of pairs, and the fields of `Rows` of a pass on it.

    Args:
      config: of the run.
      model_config: the architecture.
      response: tokens of the longest response.
      scored: positions of a row at which the next token is scored.
    """
    settings, length = config.preference, config.max_length
    pairs = settings.batch_size
    fraction = joint_share(settings.share_prompts, model_config)
    joint = length + response  # both responses and the rest of the prompt once
    joint = joint if joint <= fraction * 2 * length else None
    batch = pair_batch(pairs, 2, length, response, joint=joint)
    statistics = settings.entanglement
    if joint is None or statistics.every or statistics.ledger:  # probed steps share no prefixes
        return batch, {"rows": 2 * pairs, "length": length, "scored": scored}
    return batch, {"rows": pairs, "length": joint, "scored": 2 * scored}


def load(config: TrainConfig, inputs: Inputs) -> TokenizedData:
    """Pairs of a prompt and two responses."""
    tokenize: Callable[[Sequence[Any], str], TokenizedPairs] | None = None
    settings = config.preference
    if find_loss(settings.loss, settings.loss_options).contrastive:
        tokenize = functools.partial(inputs.pairs.instructed, contrastive_pairs)
    return load_pairs(inputs, tokenize)


def load_pairs(
    inputs: Inputs, tokenize: Callable[[Sequence[Any], str], TokenizedPairs] | None
) -> TokenizedData:
    """The pairs of a run, with shared prefixes where that saves work."""
    inputs.check_length()
    share = inputs.config.preference.share_prompts
    return dataclasses.replace(
        inputs.pairs.preferences(tokenize),
        joint_share=joint_share(share, inputs.model_config),
        shard=inputs.shard,
    )


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Pairs on the mesh, packed or not, with the reference's log-probs if they are precomputed."""
    context = with_packing(context, stage)
    config, mesh, data = context.config, context.mesh, context.data[NAME]
    objective, table = stage.objective, None
    put = functools.partial(shard_batch, mesh=mesh)
    referenced = has_reference(objective)
    if referenced and not keeps_reference_live(config, objective, len(data.train)):
        table = precompute_reference(
            objective,
            frozen["reference"],
            data.once(data.train, stage.batch_size),
            put,
            context.folder / "reference_log_probs.npz",
            mesh,
            fingerprint(config.preference, context.folder / INPUTS),
            records=data.train.record_index,
        )

    def place(batch: PairBatch) -> ReferencedBatch:
        reference = None if table is None else table[batch.record_index]
        return put(ReferencedBatch(pairs=batch, reference=reference))

    def evaluate(*arguments: Any) -> Evaluation:
        run, moving = evaluate_preferences(*arguments), stage.moving
        if moving is None:
            return run
        return lambda state, frozen: run(state, moving.frozen(state.reference, frozen))

    plain = parts.feed(
        context,
        stage,
        params,
        evaluate=evaluate,
        objective=whole_responses(objective),
        place=place,
        live_reference=referenced and table is None,
    )
    return with_ledger(context, stage, plain, put) if stage.ledger_every else plain


def fingerprint(settings: PreferenceConfig, inputs: Path) -> str:
    """What the stored log-probs of the reference depend on: data, weights and token weights."""
    weight = settings.tail_weight
    return digest(inputs) + ("" if weight == 1.0 else f", tail weight {weight}")


KIND = Kind(
    name=NAME,
    adapters=parts.run_adapters,
    build=build,
    load=load,
    feed=feed,
    finish=parts.finish,
)
