"""Search for plans: a ranked sweep, or the smallest change that fits."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxalign.config import MeshConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.planning.plans import Plan, UncompiledPlan, draft, shapes_of_run
from jaxalign.planning.topologies import slice_devices, slices_of
from jaxalign.sharding import row_parts
from jaxalign.stages import kind_of
from jaxalign.stages.models import model_of

REMAT = ("none", "dots", "full")
"""Choices, from most to least memory."""
SIZES = (0.5, 1, 2, 4)
"""Batch sizes of a sweep, as multiples of the config's."""
RANK = 16
"""Rank of the adapters that are proposed if nothing else fits."""


def sweep(
    config: TrainConfig,
    topology: str,
    name: str,
    *,
    response: int | None = None,
    example_tokens: int | None = None,
    limit: int = 5,
) -> Iterator[Plan]:
    """Plans of meshes, batch sizes, micro-batches and rematerialisation, best first.

    Plans are ordered by the bound on tokens per second, which is known without compiling, so the
    first plans that fit are the best. Plans that exceed a chip already between steps, or need more
    memory than a plan that did not fit, are not compiled.

    Args:
      config: of the run.
      topology: as in `slice_devices`.
      name: of the stage.
      response: as in `largest_batch`.
      example_tokens: as in `draft`.
      limit: number of fitting plans after which to stop.

    Raises:
      UserError: no mesh divides any of the batches.
    """
    shapes = shapes_of_run(config, name)
    drafts = [
        draft(one, topology, name, response=response, example_tokens=example_tokens, shapes=shapes)
        for one in candidates(config, topology, name)
    ]
    if not drafts:
        batch = kind_of(config, name).settings(config).batch_size
        raise UserError(
            f"{name}.batch_size: no mesh of {topology} divides {batch}, half, twice or four times "
            "as many; choose a power of two"
        )
    refused: list[UncompiledPlan] = []
    fitting = 0
    for each in sorted(drafts, key=_slowness):
        if fitting == limit:
            return
        if each.too_large or any(_takes_more(each, other) for other in refused):
            continue
        plan = each.plan()
        fitting += plan.fits
        if not plan.fits:
            refused.append(each)
        yield plan


def candidates(config: TrainConfig, topology: str, name: str) -> Iterator[TrainConfig]:
    """Configs of a sweep: powers of two, with at least one row per chip in each micro-batch."""
    devices, heads = slice_devices(topology)[0], model_of(config).heads
    chips, slices = len(devices), slices_of(devices)
    settings = kind_of(config, name).settings(config)
    powers = [2**i for i in range(chips.bit_length()) if chips % 2**i == 0]
    for tensor, fsdp, size in itertools.product(powers, powers, SIZES):
        rows, batch = chips // tensor, size * settings.batch_size
        if tensor > 8 or heads % tensor or rows % fsdp or batch % rows:
            continue
        if rows // fsdp % slices:  # each slice has parameters of its own
            continue
        if fsdp < rows // 8:  # skip more than eight replicas of the parameters
            continue
        mesh = MeshConfig(data=rows // fsdp, fsdp=fsdp, tensor=tensor)
        for parts in _divisors(int(batch) // rows):
            stage = dataclasses.replace(settings, batch_size=int(batch), micro_batches=parts)
            for remat in REMAT:
                yield dataclasses.replace(config, mesh=mesh, remat=remat, **{name: stage})


def _divisors(number: int) -> list[int]:
    """Powers of two that divide a number."""
    return [2**i for i in range(number.bit_length()) if number % 2**i == 0]


def _slowness(each: UncompiledPlan) -> tuple[float, float]:
    """Lower bound of the seconds per token, then the sum of all bounds for ties."""
    seconds = each.seconds or {"compute": each.work.flops, "links": each.work.link_bytes}
    tokens = each.work.tokens
    return round(max(seconds.values()) / tokens, 12), sum(seconds.values()) / tokens


def _takes_more(each: UncompiledPlan, other: UncompiledPlan) -> bool:
    """Whether a step certainly needs at least as much memory as another."""

    def size(one: UncompiledPlan) -> tuple[int, ...]:
        stage, mesh = one.stage, one.mesh.shape
        kept = -REMAT.index(one.config.remat)
        return mesh["data"], stage.batch_size // stage.micro_batches, kept

    return each.mesh.shape["tensor"] == other.mesh.shape["tensor"] and all(
        a >= b for a, b in zip(size(each), size(other), strict=True)
    )


def remedies(planned: UncompiledPlan) -> Iterator[tuple[str, TrainConfig]]:
    """Flags that make a stage smaller, each added to the previous ones, the smallest change first.

    Layers are recomputed, the batch is split into more micro-batches, parameters are sharded over
    all chips (first, if they fill half of a chip), rows are sharded by position, and finally
    adapters are trained instead of all parameters.

    Args:
      planned: a plan that does not fit.
    """
    stage, capacity = planned.stage, planned.chip.memory or 0
    name, shape = stage.name, dict(planned.mesh.shape)
    rows, parts = row_parts(planned.mesh) // shape["expert"], stage.micro_batches
    numbers = [parts * two for two in _divisors(stage.batch_size // (parts * rows))[1:]]
    copies = slices_of(planned.mesh.devices.flat)  # at least one in each slice
    whole = {"mesh.data": copies, "mesh.fsdp": rows // copies} if shape["data"] > copies else {}
    smaller: list[dict[str, Any]] = []
    if stage.objective.policy.remat != "full":
        smaller.append({"remat": "full"})
    smaller += [{f"{name}.micro_batches": number} for number in numbers]
    at = 0 if 2 * sum(planned.lasting.values()) > capacity else len(smaller)
    smaller[at:at] = [whole] if whole else []
    parts = numbers[-1] if numbers else parts
    if stage.batch_size == parts * rows and rows // copies % 2 == 0 and shape["sequence"] == 1:
        halved = {"mesh.data": copies, "mesh.fsdp": rows // copies // 2, "mesh.sequence": 2}
        smaller.append(halved | {f"{name}.micro_batches": 2 * parts})
    with_lora = _with(planned.config, ["lora", "rank"], RANK)
    if stage.adapter_scale is None and planned.kind.adapters(with_lora) is not None:
        smaller.append({"lora.rank": RANK})
    config, changes = planned.config, {}
    for fields in smaller:
        changes |= fields
        for field, value in fields.items():
            config = _with(config, field.split("."), value)
        flags = (f"--{field.replace('_', '-')} {value}" for field, value in changes.items())
        yield " ".join(flags), config


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """The config with another value at a path of fields."""
    name, *rest = path
    changed = _with(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: changed})


def least_chips(planned: UncompiledPlan) -> int | None:
    """Number of chips that hold the memory between steps, all of it sharded; None: no limit."""
    if planned.chip.memory is None:
        return None
    split = planned.mesh.size // planned.mesh.shape["data"]
    return -(-sum(planned.lasting.values()) * split // planned.chip.memory)
