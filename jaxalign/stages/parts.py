"""Parts common to several kinds of stages: policy, update rule, adapters, feed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.config import LoraConfig, StageConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.lora import init_adapters
from jaxalign.models.quantised import in_fewer_bits
from jaxalign.sharding import shard_batch
from jaxalign.stages.inputs import TokenizedData, count_computed, count_tokens
from jaxalign.stages.kind import Outcome, RunContext
from jaxalign.training.evaluation import Evaluation, evaluate_losses
from jaxalign.training.objectives import Policy
from jaxalign.training.optimizers import make_optimizer, make_schedule
from jaxalign.training.stage import Feed, Params, Stage, Step, Throughput
from jaxalign.training.step import train_step
from jaxalign.training.throughput import active_fraction, flops_per_token, peak_flops


def run_adapters(config: TrainConfig) -> LoraConfig | None:
    """The adapters of `config.lora`; None: all parameters are trained."""
    return config.lora if config.lora.rank else None


def make_policy(
    config: TrainConfig, model_config: ModelConfig, adapters: LoraConfig | None
) -> Policy:
    """The policy of a stage.

    Raises:
      UserError: its config does not suit the architecture.
    """
    if adapters is not None and adapters.weights != "float32":
        _check_quantised(adapters.weights, model_config)
    return Policy(
        config=_balanced(config, model_config),
        adapter_scale=None if adapters is None else adapters.scale,
        adapter_dropout=0.0 if adapters is None else adapters.dropout,
        weights="float32" if adapters is None else adapters.weights,
        remat="none" if config.remat == "auto" else config.remat,  # decided before any step
        dtype=jnp.dtype(config.dtype),
        attention=config.attention,
    )


def _check_quantised(weights: str, model_config: ModelConfig) -> None:
    """Raise `UserError` if a model's weights cannot be stored in fewer bits."""
    if not isinstance(model_config, DecoderConfig):
        what = "encoder-decoders"
    elif model_config.experts is not None:
        what = "mixtures of experts"
    else:
        return
    raise UserError(f"lora.weights: {weights} is not implemented for {what}; set float32")


def _balanced(config: TrainConfig, model_config: ModelConfig) -> ModelConfig:
    """The architecture, with the run's weight of the load-balancing loss.

    Raises:
      UserError: there is a weight, but there are no experts.
    """
    weight, experts = config.router_balance, getattr(model_config, "experts", None)
    if weight is None:
        return model_config
    if not isinstance(model_config, DecoderConfig) or experts is None:
        raise UserError(f"router_balance: {config.model} has no experts to balance; leave it out")
    return dataclasses.replace(
        model_config, experts=dataclasses.replace(experts, balance_weight=weight)
    )


def make_update_rule(
    stage: StageConfig, updates: int = 1
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """A stage's optimiser and learning-rate schedule; the schedule counts updates.

    Args:
      stage: number of steps, and optimiser.
      updates: number of updates per step.
    """
    config = stage.optimizer
    warmup = math.ceil(config.warmup_fraction * stage.steps - 1e-9)  # 0.1 * 30 is above 3
    schedule = make_schedule(
        learning_rate=config.learning_rate,
        steps=stage.steps * updates,
        schedule=config.schedule,
        warmup_steps=max(config.warmup_steps, warmup) * updates,
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


def plain_stage(
    settings: StageConfig,
    objective: Any,
    *,
    with_rules: Callable[[optax.GradientTransformation], optax.GradientTransformation] = (
        lambda optimizer: optimizer
    ),
    **options: Any,
) -> dict[str, Any]:
    """The fields of a `Stage` whose step is `train_step` on an objective.

    Args:
      settings: steps, batch size and optimiser.
      objective: with its policy.
      with_rules: adds rules for single parameters to the optimiser.
      **options: of `train_step`.
    """
    optimizer, schedule = make_update_rule(settings)
    optimizer = with_rules(optimizer)
    return cadence(settings) | {
        "parts": settings.micro_batches,
        "objective": objective,
        "optimizer": optimizer,
        "schedule": schedule,
        "step": plain_step(settings, objective, optimizer, **options),
        "stored": functools.partial(stored_weights, objective.policy),
        "adapter_scale": objective.policy.adapter_scale,
    }


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
    """The random key of a stage's initialisation.

    Args:
      config: of the run.
      number: of the kind of stage, from 1; it must not change between versions.
    """
    return jax.random.key(config.seed + number)


def trained_parameters(adapters: LoraConfig | None, key: jax.Array) -> Callable[[Params], Params]:
    """Function from parameters to trained parameters: the same, or new adapters."""

    def trained(params: Params) -> Params:
        if adapters is None:
            return params
        return init_adapters(params, key, rank=adapters.rank, targets=adapters.targets)

    return trained


def stored_weights(policy: Policy, params: Params, place: Callable[[Params], Params]) -> Params:
    """The frozen parameters under a policy's adapters as the devices store them.

    Args:
      policy: says how.
      params: of the model, or their shapes.
      place: copies new ones to the devices.
    """
    if policy.weights == "float32":
        return params
    return place(in_fewer_bits(params, policy.weights, policy.dtype))


def no_reference(adapters: LoraConfig | None) -> Callable[..., dict[str, Params]]:
    """Frozen parameters without a reference: the policy's weights under its adapters."""

    def frozen(params: Params, copy: Any, load: Any) -> dict[str, Params]:
        del copy, load
        return {"policy": None if adapters is None else params, "reference": None}

    return frozen


def with_reference(
    adapters: LoraConfig | None, dtype: str | None = None
) -> Callable[..., dict[str, Params]]:
    """Frozen parameters with a reference: the weights under the adapters, else a copy.

    Args:
      adapters: of the run.
      dtype: of a copy's matrices: that of the computation, to which a decoder converts them at
        every use, so that the copy gives the same numbers from fewer bytes. None: the weights' own.
    """

    def converted(path: Any, x: Any) -> Any:
        if dtype is None or path[-1].key not in ("kernel", "embedding"):
            return x
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    def frozen(params: Params, copy: Callable[[Params], Params], load: Any) -> dict[str, Params]:
        del load
        if adapters is None:
            reference = jax.tree_util.tree_map_with_path(converted, copy(params))
            return {"policy": None, "reference": reference}
        return {"policy": params, "reference": params}

    return frozen


def finish(context: RunContext, params: Params, kept: Params) -> Outcome:
    """The usual outcome of a stage: trained parameters, or frozen parameters and adapters."""
    return (params, kept) if run_adapters(context.config) is not None else (kept, None)


def without(names: Iterable[str]) -> Callable[[Params], Params]:
    """Function that drops the parameter trees of these names."""
    dropped = set(names)

    def kept(trained: Mapping[str, Any]) -> Params:
        if not dropped:
            return trained
        return {name: tree for name, tree in trained.items() if name not in dropped}

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
      stage: to feed.
      params: initial parameters.
      evaluate: (objective, held-out batches, mesh, their sources) -> evaluation.
      objective: of the evaluation; None: the stage's own.
      place: batch -> the step's batch on the devices; None: the same batch, sharded.
      live_reference: whether each step runs the reference.
    """
    data, mesh = context.data[stage.name], context.mesh
    assert isinstance(data, TokenizedData)
    held_out = data.evaluation(stage.batch_size)
    return Feed(
        batches=data.batches(stage.batch_size, seed=context.config.seed),
        place=place or functools.partial(shard_batch, mesh=mesh),
        describe=data.describe,
        evaluation=evaluate(objective or stage.objective, held_out, mesh, data.held_out_by_source)
        if held_out
        else None,
        throughput=throughput(
            context.model_config,
            params,
            live_reference=live_reference,
            adapters=stage.adapter_scale is not None,
        ),
    )


def throughput(
    model_config: ModelConfig,
    params: Params,
    *,
    live_reference: bool,
    adapters: bool,
    updates: int = 1,
    tokens: Any = None,
) -> Throughput:
    """Tokens and FLOPs of a batch.

    Args:
      model_config: the architecture.
      params: of the model.
      live_reference: whether each step runs the reference.
      adapters: whether only adapters are trained.
      updates: number of updates per step.
      tokens: batch -> number of its tokens; None: all tokens except padding.
    """
    each = flops_per_token(
        params,
        live_reference=live_reference,
        adapters=adapters,
        active=active_fraction(model_config),
    )
    return Throughput(
        tokens=tokens or count_tokens,
        computed=tokens or count_computed,
        flops_per_token=updates * each,
        peak_flops=peak_flops(),
    )
