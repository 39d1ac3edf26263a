"""A stage's step on a slice: what it holds and does by formula, and by the compiler."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.commands.planning.batches import largest_batch
from jaxalign.commands.planning.remat import choose_remat
from jaxalign.commands.planning.sampling import Policies, sampling_memory, sampling_policies
from jaxalign.commands.representation import stimulus_models
from jaxalign.commands.scores import trains_scores
from jaxalign.commands.stages import embedded_config, parameter_structs, stage_adapters
from jaxalign.commands.training_data import vocabulary_of
from jaxalign.commands.updates import (
    frozen_parameters,
    make_objective,
    make_policy,
    make_update_rule,
    make_watch,
    stage_step,
    trained_parameters,
)
from jaxalign.config import TrainConfig
from jaxalign.errors import UserError
from jaxalign.models.weights import CONFIG_FILES, find_model, read_config
from jaxalign.sharding import make_mesh
from jaxalign.sharding.topologies import Chip, slice_devices
from jaxalign.training.objectives import PreferenceObjective
from jaxalign.training.planning import (
    Structs,
    TooLargeError,
    bytes_on_device,
    lasting_memory,
    placed_batch,
    placed_parameters,
    step_memory,
)
from jaxalign.training.step import TrainState, initial_state
from jaxalign.training.work import Work, bound, work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on a slice: the memory that it takes, and the time that no schedule can beat."""

    stage: str
    mesh: dict[str, int]
    remat: str
    batch_size: int
    micro_batches: int
    lasting: dict[str, int]
    """Bytes per chip that stay between steps, by formula."""
    step: dict[str, int] | None
    """Bytes per chip that the compiler reserves on top; None where it found no room."""
    sampling: dict[str, int] | None
    """The same of the online stage's sampling, in place of `step`; None: there is none."""
    needed: list[float]
    """Where there is no room: bytes needed for temporaries and bytes there are, by the compiler."""
    capacity: int | None
    """Bytes of a chip; None: not known."""
    work: dict[str, Any]
    """Fields of `Work`."""
    seconds: dict[str, float]
    """Of a step, at least, by what limits it: compute, memory, links."""
    compile_seconds: float

    @property
    def total(self) -> int | None:
        """The most bytes per chip at any time; None where the compiler found no room."""
        if self.step is None:
            return None
        rest = [sum(part.values()) for part in (self.step, self.sampling) if part is not None]
        return sum(self.lasting.values()) + max(rest)

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        total = self.total
        return total is not None and (self.capacity is None or total <= self.capacity)

    @property
    def bound(self) -> float:
        """Seconds of a step, at least."""
        return max(self.seconds.values(), default=float("nan"))

    @property
    def utilisation(self) -> float:
        """Model FLOPs over those that the chip could do in that time, at most."""
        peak = self.work["flops"] / self.seconds["compute"]
        return self.work["model_flops"] / (peak * self.bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """All of a step but its compilation: shapes where a run places them, and the formulas."""

    config: TrainConfig
    stage: str
    chip: Chip
    mesh: Mesh
    objective: Any
    step: Callable[[Any, Any, Any], Any]
    """The very one that the run compiles, watched where the run watches."""
    state: TrainState
    frozen: dict[str, Structs]
    batch: Structs
    sampler: tuple[Policies, Mesh] | None
    """The online stage's policies where they sample, and their mesh."""
    lasting: dict[str, int]
    work: Work

    @property
    def seconds(self) -> dict[str, float]:
        """As in `Plan`."""
        rates = {"compute": self.chip.flops, "memory": self.chip.bandwidth, "links": self.chip.link}
        return bound(self.work, rates)

    @property
    def too_large(self) -> bool:
        """Whether what stays between steps is already more than a chip holds."""
        return self.chip.memory is not None and sum(self.lasting.values()) > self.chip.memory

    def plan(self) -> Plan:
        """What the compiler says of it."""
        config, stage = self.config, getattr(self.config, self.stage)
        start, used, sampling, needed = time.perf_counter(), None, None, []
        try:
            if self.sampler is not None:
                sampling = sampling_memory(config, self.objective.policy, *self.sampler)
            used = step_memory(self.step, self.state, self.frozen, self.batch, self.mesh)
        except TooLargeError as error:
            needed = error.sizes
        return Plan(
            stage=self.stage,
            mesh=dict(self.mesh.shape),
            remat=self.objective.policy.remat,
            batch_size=stage.batch_size,
            micro_batches=stage.micro_batches,
            lasting=self.lasting,
            step=used,
            sampling=sampling,
            needed=needed,
            capacity=self.chip.memory,
            work=dataclasses.asdict(self.work),
            seconds=self.seconds,
            compile_seconds=time.perf_counter() - start,
        )


def model_of(config: TrainConfig) -> Any:
    """The architecture, without any weights.

    Raises:
      UserError: there is no such model.
    """
    if config.model == "embedded":
        return embedded_config(config.architecture, vocabulary_of(config))
    try:
        return read_config(find_model(config.model, CONFIG_FILES))
    except UserError as error:
        raise UserError(
            f"model: {error}; a plan needs its config.json alone: --model tpu/shapes/NAME"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a stage's step reads and writes, wherever it lies."""

    params: Structs
    """That the stage begins with, as they are."""
    state: TrainState
    frozen: dict[str, Structs]


def shapes_of(config: TrainConfig, name: str, model_config: Any = None) -> Shapes:
    """Shapes of a stage's state and of what it reads: mesh, batch and remat change none of them.

    Args:
      config: of the run.
      name: the stage's.
      model_config: the architecture; None: read as the config names it.
    """
    model_config = model_of(config) if model_config is None else model_config
    params = parameter_structs(model_config, scored=trains_scores(config, name))
    optimizer, _ = make_update_rule(config, name)
    objective = make_objective(config, name, make_policy(config, name, model_config))
    running = objective.statistics.start if isinstance(objective, PreferenceObjective) else None

    def begin(params: Any) -> TrainState:
        trained = trained_parameters(config, name, model_config, params)
        return initial_state(trained, optimizer, seed=config.seed, running=running)

    frozen = frozen_parameters(config, name, objective, params, _another)
    if name == "representation":
        frozen |= stimulus_models(config.alignment, lambda field, folder: _another(params))
    return Shapes(params=params, state=jax.eval_shape(begin, params), frozen=frozen)


def _another(tree: Structs) -> Structs:
    """Shapes of a copy."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def draft(
    config: TrainConfig,
    topology: str,
    name: str,
    *,
    response: int | None = None,
    shapes: Shapes | None = None,
) -> Draft:
    """A stage's step for a slice, not compiled yet.

    Args:
      config: of the run.
      topology: as in `slice_devices`.
      name: the stage's.
      response: as in `largest_batch`.
      shapes: from `shapes_of`, where they are known.

    Raises:
      UserError: the config names no such model or slice, or its mesh does not divide the batch.
    """
    devices, chip = slice_devices(topology)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    stage, model_config, platform = getattr(config, name), model_of(config), devices[0].platform
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if (stage.batch_size // stage.micro_batches) % rows:
        raise UserError(
            f"{name}.batch_size: {stage.batch_size} in {stage.micro_batches} micro-batches is "
            f"not a multiple of data x fsdp = {rows}"
        )
    shapes = shapes_of(config, name) if shapes is None else shapes
    if config.remat == "auto":
        used = bytes_on_device(placed_parameters(shapes.params, mesh))
        remat, _ = choose_remat(
            config,
            name,
            model_config,
            shapes.state,
            shapes.frozen,
            mesh,
            platform=platform,
            free=None if chip.memory is None else chip.memory - used,
        )
        config = dataclasses.replace(config, remat=remat)
    state, frozen = (placed_parameters(tree, mesh) for tree in (shapes.state, shapes.frozen))
    policy = make_policy(config, name, model_config)
    objective = make_objective(config, name, policy)
    optimizer, _ = make_update_rule(config, name)
    batch, passes = largest_batch(config, name, objective, platform=platform, response=response)
    batch, sampler = placed_batch(batch, mesh), None
    lasting = lasting_memory(state, frozen, batch)
    if name == "online":
        sampler = sampling_policies(config, policy, state, frozen, mesh)
        if config.rollout.mesh:
            lasting["handed over"] = bytes_on_device(sampler[0])
    return Draft(
        config=config,
        stage=name,
        chip=chip,
        mesh=mesh,
        objective=objective,
        step=stage_step(config, name, objective, optimizer, make_watch(config, name, objective)),
        state=state,
        frozen=frozen,
        batch=batch,
        sampler=sampler,
        lasting=lasting,
        work=work(
            policy.config,
            shapes.params,
            state.params,
            passes,
            mesh,
            moments=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)),
            adapters=stage_adapters(config, name) is not None,
            remat=policy.remat,
            dtype=policy.dtype,
            micro_batches=stage.micro_batches,
        ),
    )


def make_plan(
    config: TrainConfig, topology: str, name: str, *, response: int | None = None
) -> Plan:
    """A stage's step compiled for a slice; arguments and errors are those of `draft`."""
    return draft(config, topology, name, response=response).plan()
