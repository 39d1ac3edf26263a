"""A stage driven from its newest checkpoint to its last step; what all stages of a run share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxalign.commands.stages import stage_folder
from jaxalign.config import StageConfig, TrainConfig
from jaxalign.progress import Progress
from jaxalign.sharding import place
from jaxalign.training.checkpoints import Checkpoints
from jaxalign.training.loop import Throughput, run_stage
from jaxalign.training.metrics import Writer
from jaxalign.training.profiling import Trace
from jaxalign.training.step import TrainState, initial_state


def in_words(values: Mapping[str, float]) -> str:
    """What a progress line shows of a step's metrics."""
    parts = [f"loss {values['loss']:.4f}"]
    if "rewards/accuracies" in values:
        parts.append(f"accuracy {values['rewards/accuracies']:.2f}")
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def of_step(what: str) -> Callable[[Any, Any, Any], str]:
    """For `progress.saying`: a step's arguments -> "the step for 8 pairs of 2 x 256 tokens"."""

    def describe(state: Any, frozen: Any, batch: Any) -> str:
        del state, frozen
        rows = getattr(batch, "pairs", getattr(batch, "responses", batch))
        count, *sides, length = rows.tokens.shape
        each = f"pairs of 2 x {length}" if sides == [2] else f"rows of {length}"
        each = f"prompts of {sides[0]} x {length}" if sides and sides != [2] else each
        text = f"{what} for {count} {each} tokens"
        if (response := getattr(rows, "response_tokens", None)) is not None:
            text += f", responses of {response.shape[-1]}"
        if (joint := getattr(rows, "joint_tokens", None)) is not None:
            text += f", sharing prompts in {joint.shape[-1]}"
        return text

    return describe


@dataclass(frozen=True, kw_only=True)
class World:
    """What every stage of a run shares."""

    config: TrainConfig
    folder: Path
    mesh: Mesh
    model_config: Any
    tokenizer: Any
    data: Mapping[str, Any]
    """What each stage reads, by its name."""
    writers: Sequence[Writer]


def drive(
    world: World,
    name: str,
    *,
    trained: Any,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    batches: Any,
    make_step: Callable[[TrainState], Callable[[int], Callable]],
    place_batch: Callable[[Any], Any],
    describe: Callable[[Any], Sequence[str]],
    evaluation: Callable[[TrainState, Any], dict[str, float]] | None,
    throughput: Throughput,
    running: Mapping[str, float] | None = None,
) -> TrainState:
    """Go from a stage's newest checkpoint, or from its start, to its last step.

    Args:
      world: of the run.
      name: the stage's.
      trained: parameters to start from.
      frozen: what the step reads and never changes.
      optimizer: the update rule.
      schedule: its learning rate.
      batches: as in `run_stage`.
      make_step: state -> as in `run_stage`.
      place_batch: as in `run_stage`.
      describe: as in `run_stage`.
      evaluation: as in `run_stage`.
      throughput: as in `run_stage`.
      running: the loss's running statistics at the start; None: it has none.

    Returns:
      The state after the last step.
    """
    config, stage = world.config, getattr(world.config, name)
    assert isinstance(stage, StageConfig)
    fresh = functools.partial(initial_state, optimizer=optimizer, seed=config.seed)
    with Checkpoints(stage_folder(world.folder, name)) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            state = place(fresh(trained, running=running), world.mesh)
        else:
            state, meta = checkpoints.restore(latest, jax.eval_shape(fresh, trained), world.mesh)
            batches.set_state(meta["iterator"])
            values = {name: jnp.float32(x) for name, x in meta.get("running", {}).items()}
            state = dataclasses.replace(state, running=place(values, world.mesh))
        start = int(state.step)
        first = min(start + 2, max(stage.steps - config.profile, start))
        traced = config.profile and jax.process_index() == 0
        folder = world.folder / "profile" / name if traced else None
        with Progress(name, stage.steps, done=start, unit="step") as progress:
            state = run_stage(
                name,
                state=state,
                frozen=frozen,
                step=make_step(state),
                batches=batches,
                place_batch=place_batch,
                describe=describe,
                steps=stage.steps,
                schedule=schedule,
                evaluation=evaluation,
                eval_every=stage.eval_every,
                save_every=stage.save_every,
                checkpoints=checkpoints,
                writers=world.writers,
                throughput=throughput,
                nonfinite=config.nonfinite,
                progress=lambda step, values: progress(step, in_words(values)),
                trace=Trace(folder, first=first, steps=config.profile),
            )
    return state
