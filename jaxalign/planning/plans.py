"""Plan of a stage's step on a slice: memory and work, by formula and by the compiler."""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.config import TrainConfig
from jaxalign.data.packing import Packing
from jaxalign.errors import UserError
from jaxalign.planning.attention import AttentionCost, attention_costs
from jaxalign.planning.compiled import TooLargeError, lasting_memory, program_memory, step_memory
from jaxalign.planning.cost_model import Work, bound, work
from jaxalign.planning.packed import packed_batch
from jaxalign.planning.topologies import Chip, slice_devices, slices_of
from jaxalign.sharding import make_mesh, row_parts
from jaxalign.sharding.structs import Structs, bytes_on_device, placed_batch, placed_parameters
from jaxalign.stages import Kind, kind_of
from jaxalign.stages.models import model_of
from jaxalign.stages.rematerialisation import choose_remat
from jaxalign.stages.shapes import Shapes, shapes_of
from jaxalign.training.ledger import HELD_OUT
from jaxalign.training.stage import Rows, Stage, Step
from jaxalign.training.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on a slice: its memory, and a lower bound of its time."""

    stage: str
    mesh: dict[str, int]
    remat: str
    batch_size: int
    micro_batches: int
    lasting: dict[str, int]
    """Bytes per chip that stay between steps, by formula."""
    step: dict[str, int] | None
    """Further bytes per chip by the compiler; None: the step does not fit."""
    sampling: dict[str, int] | None
    """The same for the online stage's sampling, instead of `step`; None: no sampling."""
    needed: list[float]
    """If it does not fit: bytes needed for temporaries and bytes available, by the compiler."""
    capacity: int | None
    """Bytes of a chip; None: unknown."""
    work: dict[str, Any]
    """Fields of `Work`."""
    seconds: dict[str, float]
    """Lower bounds of a step's seconds, by what limits it: compute, memory, links, network."""
    compile_seconds: float

    @property
    def total(self) -> int | None:
        """Peak bytes per chip; None: the step does not fit."""
        if self.step is None:
            return None
        rest = [sum(part.values()) for part in (self.step, self.sampling) if part is not None]
        return sum(self.lasting.values()) + max(rest)

    @property
    def fits(self) -> bool:
        """Whether it fits on a chip."""
        total = self.total
        return total is not None and (self.capacity is None or total <= self.capacity)

    @property
    def bound(self) -> float:
        """Lower bound of a step's seconds."""
        return max(self.seconds.values(), default=float("nan"))

    @property
    def utilisation(self) -> float:
        """Upper bound of model FLOP utilisation."""
        peak = self.work["flops"] / self.seconds["compute"]
        return self.work["model_flops"] / (peak * self.bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UncompiledPlan:
    """A plan before compilation: placed shapes, and costs by formula."""

    config: TrainConfig
    kind: Kind
    stage: Stage
    """The stage as the run builds it."""
    chip: Chip
    mesh: Mesh
    state: TrainState
    frozen: dict[str, Structs]
    batch: Structs
    sampler: tuple[dict[str, Any], Mesh] | None
    """Shapes of the policies that sample between updates, placed on their mesh; None: no
    sampling."""
    lasting: dict[str, int]
    passes: list[Rows]
    """What a step runs through the network."""
    work: Work

    @property
    def step(self) -> Step:
        """The step to compile: the largest, with a ledger or with probes if there is one."""
        return self.stage.ledger_step or self.stage.probed_step or self.stage.step

    @property
    def seconds(self) -> dict[str, float]:
        """As in `Plan`."""
        rates = {"compute": self.chip.flops, "memory": self.chip.bandwidth, "links": self.chip.link}
        if slices_of(self.mesh.devices.flat) > 1:
            rates["network"] = self.chip.network
        return bound(self.work, rates)

    @property
    def too_large(self) -> bool:
        """Whether the memory between steps already exceeds a chip's."""
        return self.chip.memory is not None and sum(self.lasting.values()) > self.chip.memory

    def attention_costs(self) -> list[AttentionCost]:
        """Compile one layer's attention in each of its implementations."""
        policy = self.stage.objective.policy
        return attention_costs(
            policy.config,
            self.passes[0],
            self.mesh,
            dtype=policy.dtype,
            micro_batches=self.stage.micro_batches,
        )

    def plan(self) -> Plan:
        """Compile it."""
        stage, start = self.stage, time.perf_counter()
        used, sampling, needed = None, None, []
        try:
            if self.sampler is not None and stage.sampling is not None:
                programs = stage.sampling.programs(*self.sampler)
                sizes = [
                    program_memory(program, self.sampler[1], *arguments)
                    for program, arguments in programs
                ]
                sampling = max(sizes, key=lambda size: sum(size.values()))
            used = step_memory(self.step, self.state, self.frozen, self.batch, self.mesh)
        except TooLargeError as error:
            needed = error.sizes
        return Plan(
            stage=stage.name,
            mesh=dict(self.mesh.shape),
            remat=stage.objective.policy.remat,
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


def shapes_of_run(config: TrainConfig, name: str) -> Shapes:
    """Shapes of a stage of a config, without loading its model."""
    model_config = model_of(config)
    return shapes_of(kind_of(config, name).build(config, model_config), model_config)


def draft(
    config: TrainConfig,
    topology: str,
    name: str,
    *,
    response: int | None = None,
    example_tokens: int | None = None,
    shapes: Shapes | None = None,
) -> UncompiledPlan:
    """The plan of a stage's step on a slice, before compilation.

    Args:
      config: of the run.
      topology: as in `slice_devices`.
      name: of the stage.
      response: tokens of the longest response; None: up to the whole row.
      example_tokens: mean number of tokens of an example in packed rows; None: rows are padded.
      shapes: from `shapes_of`; None: to be computed.

    Raises:
      UserError: there is no such model or slice, the mesh does not divide the batch, or the rows of
        the stage cannot be packed.
    """
    devices, chip = slice_devices(topology)
    kind = kind_of(config, name)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    settings, model_config, platform = kind.settings(config), model_of(config), devices[0].platform
    rows, slices = row_parts(mesh), slices_of(devices)
    if mesh.shape["data"] % slices:
        raise UserError(
            f"mesh.data: {mesh.shape['data']} is not a multiple of {slices}, the number of slices, "
            "each of which needs parameters of its own"
        )
    if (settings.batch_size // settings.micro_batches) % rows:
        raise UserError(
            f"{kind.name}.batch_size: {settings.batch_size} in {settings.micro_batches} "
            f"micro-batches is not a multiple of data x fsdp x expert = {rows}"
        )
    if shapes is None:
        shapes = shapes_of(kind.build(config, model_config), model_config)
    if config.remat == "auto":
        used = bytes_on_device(placed_parameters(shapes.resident, mesh))
        free = None if chip.memory is None else chip.memory - used
        remat, _ = choose_remat(
            kind, config, model_config, shapes, mesh, platform=platform, free=free
        )
        config = dataclasses.replace(config, remat=remat)
    stage = kind.build(config, model_config)
    state, frozen = (placed_parameters(tree, mesh) for tree in (shapes.state, shapes.frozen))
    largest, passes = stage.largest_batch(platform, response)
    if example_tokens is not None:
        packing = Packing(
            shards=rows,
            micro_batches=settings.micro_batches,
            apart=stage.probed_step is not None or stage.ledger_step is not None,
        )
        largest, passes = packed_batch(
            stage, largest, passes, example_tokens=example_tokens, packing=packing
        )
    batch, sampler = placed_batch(largest, mesh), None
    if stage.ledger_step is not None:
        frozen = {**frozen, HELD_OUT: batch.pairs}  # as many held-out pairs, of any length
    lasting = lasting_memory(state, frozen, batch)
    if stage.sampling is not None:
        sampler = stage.sampling.policies(state, frozen, mesh)
        if stage.sampling.resharded:
            lasting["resharded policies"] = bytes_on_device(sampler[0])
    policy = stage.objective.policy
    return UncompiledPlan(
        config=config,
        kind=kind,
        stage=stage,
        chip=chip,
        mesh=mesh,
        state=state,
        frozen=frozen,
        batch=batch,
        sampler=sampler,
        lasting=lasting,
        passes=passes,
        work=work(
            policy.config,
            shapes.params,
            state.params,
            passes,
            mesh,
            moments=bytes_of_moments(state),
            adapters=stage.adapter_scale is not None,
            remat=policy.remat,
            dtype=policy.dtype,
            micro_batches=stage.micro_batches,
            slices=slices,
        ),
    )


def bytes_of_moments(state: TrainState) -> int:
    """Bytes of the optimiser's state, of all devices together."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))


def make_plan(
    config: TrainConfig,
    topology: str,
    name: str,
    *,
    response: int | None = None,
    example_tokens: int | None = None,
) -> Plan:
    """The compiled plan of a stage's step; arguments and errors are those of `draft`."""
    return draft(config, topology, name, response=response, example_tokens=example_tokens).plan()
