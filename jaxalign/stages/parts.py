"""What several kinds of stages are made of: policy, update rule, adapters, common feeds."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.config import LoraConfig, StageConfig, TrainConfig
from jaxalign.models.lora import init_adapters
from jaxalign.sharding import shard_batch
from jaxalign.stages.inputs import TokenizedData, count_computed, count_tokens
from jaxalign.stages.kind import Outcome, RunContext
from jaxalign.training.evaluation import Evaluation, evaluate_losses
from jaxalign.training.objectives import Policy
from jaxalign.training.optimizers import make_optimizer, make_schedule
from jaxalign.training.stage import Feed, Params, Stage, Step, Throughput
from jaxalign.training.step import train_step
from jaxalign.training.throughput import flops_per_token, peak_flops


def run_adapters(config: TrainConfig) -> LoraConfig | None:
    """The adapters of `config.lora`; None: it has none."""
    return config.lora if config.lora.rank else None


def make_policy(config: TrainConfig, model_config: Any, adapters: LoraConfig | None) -> Policy:
    """How a stage's parameters make up the policy."""
    return Policy(
        config=model_config,
        adapter_scale=None if adapters is None else adapters.scale,
        adapter_dropout=0.0 if adapters is None else adapters.dropout,
        remat="none" if config.remat == "auto" else config.remat,  # decided before any step
        dtype=jnp.dtype(config.dtype),
    )


def make_update_rule(
    stage: StageConfig, updates: int = 1
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """A stage's optimiser and its learning-rate schedule, both by update.

    Args:
      stage: steps and optimiser.
      updates: in each step.
    """
    config = stage.optimizer
    fraction = math.ceil(config.warmup_fraction * stage.steps - 1e-9)  # 0.1 * 30 is above 3
    schedule = make_schedule(
        learning_rate=config.learning_rate,
        steps=stage.steps * updates,
        schedule=config.schedule,
        warmup_steps=max(config.warmup_steps, fraction) * updates,
        final_fraction=config.final_fraction,
    )
    optimizer = make_optimizer(
        config.name,
        schedule,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        momentum=config.momentum,
        parameter_scale=config.parameter_scale,
    )
    return optimizer, schedule


def cadence(stage: StageConfig) -> dict[str, Any]:
    """The fields of a `Stage` that its config has under the same names."""
    names = ("steps", "batch_size", "micro_batches", "eval_every", "save_every")
    return {name: getattr(stage, name) for name in names}


def plain_step(
    stage: StageConfig, objective: Any, optimizer: optax.GradientTransformation, **options: Any
) -> Step:
    """`train_step` with a stage's objective and optimiser."""
    return functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        micro_batches=stage.micro_batches,
        **options,
    )


def key_of(config: TrainConfig, number: int) -> jax.Array:
    """The key of whatever a stage draws at its start.

    Args:
      config: of the run.
      number: of the kind of stage, 1 for the first; it must not change between versions.
    """
    return jax.random.key(config.seed + number)


def trained_parameters(adapters: LoraConfig | None, key: jax.Array) -> Callable[[Params], Params]:
    """Parameters -> the parameters themselves, or new adapters beside them."""

    def trained(params: Params) -> Params:
        if adapters is None:
            return params
        return init_adapters(params, key, rank=adapters.rank, targets=adapters.targets)

    return trained


def no_reference(adapters: LoraConfig | None) -> Callable[..., dict[str, Params]]:
    """What a step without a reference reads: the policy's weights under its adapters."""

    def frozen(params: Params, copy: Any, load: Any) -> dict[str, Params]:
        del copy, load
        return {"policy": None if adapters is None else params, "reference": None}

    return frozen


def with_reference(adapters: LoraConfig | None) -> Callable[..., dict[str, Params]]:
    """What a step with a reference reads: under adapters the policy's own weights, else a copy."""

    def frozen(params: Params, copy: Callable[[Params], Params], load: Any) -> dict[str, Params]:
        del load
        if adapters is None:
            return {"policy": None, "reference": copy(params)}
        return {"policy": params, "reference": params}

    return frozen


def finish(context: RunContext, params: Params, kept: Params) -> Outcome:
    """The usual end of a stage: trained parameters, or adapters beside frozen ones."""
    return (params, kept) if run_adapters(context.config) is not None else (kept, None)


def without(names: Iterable[str]) -> Callable[[Params], Params]:
    """Parameters without the trees of these names."""
    left_out = set(names)

    def kept(trained: Mapping[str, Any]) -> Params:
        if not left_out:
            return trained
        return {name: tree for name, tree in trained.items() if name not in left_out}

    return kept


def feed(
    context: RunContext,
    stage: Stage,
    params: Params,
    *,
    evaluate: Callable[..., Evaluation] = evaluate_losses,
    objective: Any = None,
    place: Callable[[Any], Any] | None = None,
    live_reference: bool = False,
) -> Feed:
    """The feed of a stage that trains on rows or pairs.

    Args:
      context: of the run.
      stage: that is fed.
      params: at the beginning.
      evaluate: (objective, held-out batches, mesh) -> evaluation.
      objective: for the evaluation; None: the stage's own.
      place: batch -> what the step takes; None: on the mesh as it is.
      live_reference: whether each step runs a reference.
    """
    data, mesh = context.data[stage.name], context.mesh
    assert isinstance(data, TokenizedData)
    held_out = data.evaluation(stage.batch_size)
    return Feed(
        batches=data.batches(stage.batch_size, seed=context.config.seed),
        place=place or functools.partial(shard_batch, mesh=mesh),
        describe=data.describe,
        evaluation=evaluate(objective or stage.objective, held_out, mesh) if held_out else None,
        throughput=throughput(
            params, live_reference=live_reference, adapters=stage.adapter_scale is not None
        ),
    )


def throughput(
    params: Params, *, live_reference: bool, adapters: bool, updates: int = 1, tokens: Any = None
) -> Throughput:
    """What a batch costs.

    Args:
      params: of the model.
      live_reference: whether each step runs a reference.
      adapters: whether adapters alone are trained.
      updates: in each step.
      tokens: batch -> its tokens, where not all of its rows count.
    """
    each = flops_per_token(params, live_reference=live_reference, adapters=adapters)
    return Throughput(
        tokens=tokens or count_tokens,
        computed=tokens or count_computed,
        flops_per_token=updates * each,
        peak_flops=peak_flops(),
    )
