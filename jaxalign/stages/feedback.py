"""Feedback on single responses: a loss of responses that are labelled desirable or not (KTO)."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config import TrainConfig
from jaxalign.data import tokenize_responses
from jaxalign.data.labelled import (
    LabelledBatch,
    LabelledRows,
    Mismatched,
    labelled_batches,
    labelled_positions,
)
from jaxalign.data.mixtures import BySource, Mixture
from jaxalign.data.order import WINDOW, Iterations
from jaxalign.data.packing import Packing
from jaxalign.data.record_index import IndexedRecords
from jaxalign.data.records import PromptResponseRecord, UnpairedRecord
from jaxalign.data.sources import unpaired_kind
from jaxalign.errors import UserError
from jaxalign.evaluation.logistic import fit_logistic
from jaxalign.files import digest
from jaxalign.losses import kto_weights
from jaxalign.losses.lookup import find_labelled_loss
from jaxalign.models.config import ModelConfig
from jaxalign.sharding import shard_batch
from jaxalign.stages import parts
from jaxalign.stages.inputs import INPUTS, Inputs
from jaxalign.stages.kind import Kind, RunContext
from jaxalign.stages.packing import with_packing
from jaxalign.stages.records import counted_mixture, run_records, sources_of
from jaxalign.stages.structs import pair_batch, record_of, struct
from jaxalign.training.labelled import LabelledObjective, count_tokens, evaluate_labelled
from jaxalign.training.prompt_weights import precompute_prompt_weights
from jaxalign.training.stage import Feed, Params, Rows, Stage

NAME, NUMBER = "feedback", 6


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that trains a policy with a loss of labelled responses."""
    settings, adapters = config.feedback, parts.run_adapters(config)
    loss = find_labelled_loss(settings.loss, settings.loss_options)
    objective = LabelledObjective(
        policy=parts.make_policy(config, model_config, adapters),
        loss=loss.function,
        options=dict(settings.loss_options),
        coupled=loss.coupled,
    )
    rows, length = settings.batch_size, config.max_length
    has_mismatched = objective.statistics.mismatched
    has_weights = settings.prompt_weights != "none"

    def largest_batch(platform: str, response: int | None) -> tuple[Any, list[Rows]]:
        del platform
        scored = response or length
        batch = record_of(
            LabelledBatch,
            responses=pair_batch(rows, 1, length, scored),
            mismatched=pair_batch(rows, 1, length, scored) if has_mismatched else None,
            desirable=struct(rows, dtype=jnp.bool_),
            importance=struct(rows, dtype=jnp.float32) if has_weights else None,
        )
        twice = objective.coupled and settings.micro_batches > 1  # the statistic, then the gradient
        one = {"rows": rows, "length": length, "scored": scored}
        passes = [Rows(**one, forward=2 + twice, backward=1)]
        return batch, [*passes, Rows(**one, forward=2)] if has_mismatched else passes

    return Stage(
        name=NAME,
        method=settings.loss,
        rows=f"labelled responses of {length:,} tokens",
        **parts.plain_stage(settings, objective),
        running=objective.statistics.start,
        trained=parts.trained_parameters(adapters, parts.key_of(config, NUMBER)),
        frozen=parts.with_reference(adapters),
        largest_batch=largest_batch,
    )


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """Training and held-out responses with their labels."""

    train: LabelledRows
    held_out: LabelledRows | None
    sources: Sequence[str]
    """File and line of each training record, by its number."""
    max_length: int
    mismatched: bool = False
    """Whether prompts also get the responses of others, which a loss reads."""
    packing: Packing | None = None
    """Rows of a packed training batch; None: padded."""
    mixture: Mixture | None = None
    """How often the sources' training responses are used; None: all once an epoch."""
    held_out_by_source: BySource | None = None
    """The held-out records of each source; None: there is one."""
    shard: tuple[int, int]

    def examples(self, seed: int) -> int:
        """Number of labelled responses in an epoch."""
        del seed
        return len(self.train) if self.mixture is None else self.mixture.examples

    def batches(self, batch_size: int, *, seed: int) -> Iterations:
        """The endless, checkpointable iterator of this process's training batches."""
        return self._batches(
            self.train,
            "batch",
            packing=self.packing,
            batch_size=batch_size,
            seed=seed,
            mixture=self.mixture,
        )

    def evaluation(self, batch_size: int) -> list[LabelledBatch]:
        """The held-out batches; empty if nothing is held out."""
        if self.held_out is None:
            return []
        packing = self.packing
        if packing is not None:
            packing = dataclasses.replace(packing, micro_batches=1)
        once = {"epochs": 1, "shuffle": False, "window": WINDOW, "batch_size": batch_size}
        return list(self._batches(self.held_out, "all", packing=packing, **once))

    def once(self, batch_size: int) -> list[LabelledBatch]:
        """Every training response once, padded, without those of others."""
        once = {"epochs": 1, "shuffle": False, "window": WINDOW, "batch_size": batch_size}
        plain = dataclasses.replace(self, mismatched=False)
        return list(plain._batches(self.train, "all", **once))

    def _batches(self, rows: LabelledRows, whose: Mismatched, **options: Any) -> Iterations:
        index, count = self.shard
        return labelled_batches(
            rows,
            max_length=self.max_length,
            mismatched=whose if self.mismatched else "none",
            process_index=index,
            process_count=count,
            **options,
        )

    def positions(self, packing: Packing | None, **order: Any) -> float:
        """Mean number of positions that the network computes for a training batch.

        Args:
          packing: number of packed rows; None: padded.
          **order: batch_size and seed.
        """
        return labelled_positions(
            self.train,
            packing,
            max_length=self.max_length,
            mismatched="batch" if self.mismatched else "none",
            mixture=self.mixture,
            **order,
        )

    def describe(self, batch: LabelledBatch) -> list[str]:
        """File and line of a batch's records."""
        numbers = np.asarray(batch.record_index)[np.asarray(batch.responses.weight) > 0]
        return [self.sources[int(number)] for number in numbers]


def load(config: TrainConfig, inputs: Inputs) -> LabelledData:
    """Labelled responses, or both responses of the run's pairs."""
    inputs.check_length()
    settings = config.feedback
    records = run_records(
        unpaired_kind(settings.threshold),
        *config.labelled_sources(),
        config,
        inputs.report,
        ("feedback.data", "feedback.eval_data"),
    )

    def rows(records: Sequence[UnpairedRecord], name: str) -> LabelledRows:
        if isinstance(records, IndexedRecords):
            responses, desirable = records.map(response_of), records.labels
        else:
            responses = [response_of(one) for one in records]
            desirable = np.array([one.label for one in records])
        tokens = inputs.tokenized(tokenize_responses, responses, name)
        return LabelledRows(rows=tokens, desirable=desirable[tokens.record_index])

    train = rows(records.train, "train_labelled")
    return LabelledData(
        train=train,
        held_out=rows(records.held_out, "held_out_labelled") if records.held_out else None,
        sources=sources_of(records.train),
        max_length=config.max_length,
        mixture=counted_mixture(
            records, train.rows.record_index, inputs.report, "labelled responses"
        ),
        held_out_by_source=records.by_source(),
        shard=inputs.shard,
    )


def response_of(record: UnpairedRecord) -> PromptResponseRecord:
    """A labelled response without its label."""
    return PromptResponseRecord(
        prompt=record.prompt, response=record.completion, source=record.source, line=record.line
    )


def settle(config: TrainConfig, data: LabelledData) -> TrainConfig:
    """The config with KTO's weights for unequal numbers of labels, unless weights are set."""
    settings = config.feedback
    names = ("lambda_desirable", "lambda_undesirable")
    desirable = int(data.train.desirable.sum())
    undesirable = len(data.train) - desirable
    if settings.prompt_weights != "none" and not (desirable and undesirable):
        raise UserError(
            f"feedback.prompt_weights: {settings.prompt_weights} compares the prompts of two "
            "labels, and the data have one; set none"
        )
    line = f"{NAME}: {desirable:,} desirable and {undesirable:,} undesirable responses"
    weights: dict[str, float] = {}
    is_set = settings.balance == "none" or any(name in settings.loss_options for name in names)
    if settings.loss == "kto_unpaired" and not is_set:
        weights = dict(zip(names, kto_weights(desirable, undesirable), strict=True))
    said = ", ".join(f"{name} {value:.3g}" for name, value in weights.items() if value != 1)
    if jax.process_index() == 0:
        print(line + (f": {said} (--feedback.balance none: 1)" if said else ""))
    options = {**settings.loss_options, **weights}
    return dataclasses.replace(config, feedback=dataclasses.replace(settings, loss_options=options))


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Labelled responses on the mesh, packed or not."""
    objective, mesh, data = stage.objective, context.mesh, context.data[NAME]
    data = dataclasses.replace(data, mismatched=objective.statistics.mismatched)
    context = dataclasses.replace(context, data={**context.data, NAME: data})
    data = with_packing(context, stage).data[NAME]
    held_out = data.evaluation(stage.batch_size)
    put = functools.partial(shard_batch, mesh=mesh)
    weights = None
    if context.config.feedback.prompt_weights == "udm":
        weights = precompute_prompt_weights(
            objective.policy,
            frozen["reference"],
            data.once(stage.batch_size),
            put,
            context.folder / "prompt_weights.npz",
            mesh,
            digest(context.folder / INPUTS),
            fit=fit_logistic,
            seed=context.config.seed,
        )

    def place(batch: LabelledBatch) -> LabelledBatch:
        if weights is None:
            return put(batch)
        return put(dataclasses.replace(batch, importance=weights[batch.record_index]))

    return Feed(
        batches=data.batches(stage.batch_size, seed=context.config.seed),
        place=place,
        describe=data.describe,
        evaluation=evaluate_labelled(objective, held_out, mesh, data.held_out_by_source)
        if held_out
        else None,
        throughput=parts.throughput(
            context.model_config,
            params,
            live_reference=True,
            adapters=stage.adapter_scale is not None,
            tokens=jax.jit(count_tokens),
        ),
    )


KIND = Kind(
    name=NAME,
    adapters=parts.run_adapters,
    build=build,
    load=load,
    feed=feed,
    finish=parts.finish,
    settle=settle,
)
