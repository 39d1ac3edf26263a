"""Run one stage to its last step, from its start or its newest checkpoint."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.progress import Progress, saying
from jaxalign.sharding import place
from jaxalign.stages.kind import Kind, Outcome, RunContext
from jaxalign.stages.models import load_like, stage_folder
from jaxalign.training.checkpoints import Checkpoints
from jaxalign.training.loop import run_stage
from jaxalign.training.profiling import Trace
from jaxalign.training.stage import Feed, Params, Stage, Step
from jaxalign.training.step import TrainState, compile_step, initial_state, saved_fields


def run(kind: Kind, context: RunContext, params: Params) -> Outcome:
    """Train one stage.

    Args:
      kind: of the stage.
      context: of the run.
      params: initial parameters.

    Returns:
      The trained parameters and None; or frozen parameters and trained adapters.
    """
    config, mesh = context.config, context.mesh
    stage = kind.build(config, context.model_config)
    put = functools.partial(place, mesh=mesh)
    params = stage.begin(params, put)
    trained = stage.trained(params)
    frozen = stage.frozen(stage.stored(params, put), put, functools.partial(load_like, context))
    feed = kind.feed(context, stage, params, frozen)
    with Checkpoints(stage_folder(context.folder, stage.name)) as checkpoints:
        state = begin_or_resume(stage, trained, feed, checkpoints, mesh, seed=config.seed)
        del trained
        start = int(state.step)
        first = min(start + 2, max(stage.steps - config.profile, start))
        traced = config.profile and jax.process_index() == 0
        folder = context.folder / "profile" / stage.name if traced else None
        with Progress(stage.name, stage.steps, done=start, unit="step") as progress:
            state = run_stage(
                stage,
                feed,
                state=state,
                frozen=frozen,
                step=compiled_steps(stage, feed, state, mesh),
                checkpoints=checkpoints,
                writers=context.writers,
                nonfinite=config.nonfinite,
                progress=lambda step, values: progress(step, in_words(values)),
                trace=Trace(folder, first=first, steps=config.profile),
            )
    return kind.finish(context, params, stage.kept(state.params))


def begin_or_resume(
    stage: Stage, trained: Params, feed: Feed, checkpoints: Checkpoints, mesh: Mesh, *, seed: int
) -> TrainState:
    """The state at the stage's start or newest checkpoint; sets the feed to the same position."""
    fresh = functools.partial(
        initial_state, optimizer=stage.optimizer, seed=seed, moving=stage.moving
    )
    latest = checkpoints.latest()
    if latest is None:
        return place(fresh(trained, running=stage.running), mesh)
    like = saved_fields(jax.eval_shape(fresh, trained))
    fields, meta = checkpoints.restore(latest, like, mesh)
    feed.batches.set_state(meta["iterator"])
    values = {name: jnp.float32(x) for name, x in meta.get("running", {}).items()}
    return TrainState(**{**fields, "running": place(values, mesh)})


def compiled_steps(
    stage: Stage, feed: Feed, state: TrainState, mesh: Mesh
) -> Callable[[int], Step]:
    """Function from the number of updates made to the compiled step of the next update."""

    def compiled(step: Step, what: str, *, probed: bool = False) -> Step:
        text = in_shapes(what, probed=probed)
        return feed.around(saying(compile_step(step, state, mesh), text))

    plain = compiled(stage.step, "the step")
    others = [
        (compiled(other, what, probed=True), every)
        for other, what, every in (
            (stage.ledger_step, "the step with a ledger", stage.ledger_every),
            (stage.probed_step, "the step with per-pair statistics", stage.probe_every),
        )
        if other is not None and every
    ]

    def step(done: int) -> Step:
        return next((other for other, every in others if done % every == 0), plain)

    return step


def in_words(values: Mapping[str, float]) -> str:
    """A step's metrics for the progress line."""
    parts = [f"loss {values['loss']:.4f}"]
    if "rewards/accuracies" in values:
        parts.append(f"accuracy {values['rewards/accuracies']:.2f}")
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def in_shapes(what: str, *, probed: bool = False) -> Callable[[Any, Any, Any], str]:
    """For `progress.saying`: a step's arguments -> "the step for 8 pairs of 2 x 256 tokens".

    Args:
      what: is compiled.
      probed: whether the step reads the rows of pairs without shared prompts.
    """

    def describe(state: Any, frozen: Any, batch: Any) -> str:
        del state, frozen
        rows = getattr(batch, "pairs", getattr(batch, "responses", batch))
        rows = rows.apart() if probed else rows
        count, *sides, length = rows.tokens.shape
        each = f"pairs of 2 x {length}" if sides == [2] else f"rows of {length}"
        each = f"prompts of {sides[0]} x {length}" if sides and sides[0] > 2 else each
        text = f"{what} for {count} {each} tokens"
        if (response := getattr(rows, "response_tokens", None)) is not None:
            text += f", responses of {response.shape[-1]}"
        if (packed := getattr(rows, "packed", None)) is not None:
            text += ", packed in {} x {}".format(*packed.tokens.shape)
        elif (joint := getattr(rows, "joint_tokens", None)) is not None:
            text += f", sharing prompts in {joint.shape[-1]}"
        return text

    return describe
