"""Other ways to run a stage on a slice: all of them ranked, or the nearest that fits."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxalign.config import MeshConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.planning.plans import Plan, UncompiledPlan, draft, shapes_of_run
from jaxalign.planning.topologies import slice_devices
from jaxalign.stages import kind_of
from jaxalign.stages.models import model_of

REMAT = ("none", "dots", "full")
"""From the most memory to the least."""
SIZES = (0.5, 1, 2, 4)
"""Batches that a sweep tries, in units of the config's own."""
RANK = 16
"""Of the adapters that are proposed where nothing else makes a stage fit."""


def sweep(
    config: TrainConfig, topology: str, name: str, *, response: int | None = None, limit: int = 5
) -> Iterator[Plan]:
    """Meshes, batch sizes, micro-batches and rematerialisation, best first, until enough fit.

    The order is that of the bound on tokens per second, which is known before anything is compiled:
    so those that fit come ranked, and none that follows is better. What is more than a chip without
    its step, or more than what did not fit already, is not compiled.

    Args:
      config: of the run.
      topology: as in `slice_devices`.
      name: of the stage.
      response: as in `largest_batch`.
      limit: number of fitting plans to find.

    Raises:
      UserError: no mesh divides any of the batches.
    """
    how = {"response": response, "shapes": shapes_of_run(config, name)}
    drafts = [draft(one, topology, name, **how) for one in candidates(config, topology, name)]
    if not drafts:
        batch = kind_of(config, name).settings(config).batch_size
        raise UserError(
            f"{name}.batch_size: no mesh of {topology} divides {batch}, half, twice or four times "
            "as many; choose a power of two"
        )
    refused: list[UncompiledPlan] = []
    found = 0
    for each in sorted(drafts, key=_slowness):
        if found == limit:
            return
        if each.too_large or any(_takes_more(each, other) for other in refused):
            continue
        plan = each.plan()
        found += plan.fits
        if not plan.fits:
            refused.append(each)
        yield plan


def candidates(config: TrainConfig, topology: str, name: str) -> Iterator[TrainConfig]:
    """Configs of a sweep: powers of two of everything, one row a chip or more in each part."""
    chips, heads = len(slice_devices(topology)[0]), model_of(config).heads
    settings = kind_of(config, name).settings(config)
    powers = [2**i for i in range(chips.bit_length()) if chips % 2**i == 0]
    for tensor, fsdp, size in itertools.product(powers, powers, SIZES):
        rows, batch = chips // tensor, size * settings.batch_size
        if tensor > 8 or heads % tensor or rows % fsdp or batch % rows:
            continue
        if fsdp < rows // 8:  # more than eight whole copies of the parameters: left out
            continue
        mesh = MeshConfig(data=rows // fsdp, fsdp=fsdp, tensor=tensor)
        for parts in _divisors(int(batch) // rows):
            stage = dataclasses.replace(settings, batch_size=int(batch), micro_batches=parts)
            for remat in REMAT:
                yield dataclasses.replace(config, mesh=mesh, remat=remat, **{name: stage})


def _divisors(number: int) -> list[int]:
    """Powers of two that divide it."""
    return [2**i for i in range(number.bit_length()) if number % 2**i == 0]


def _slowness(each: UncompiledPlan) -> tuple[float, float]:
    """Least seconds of a token: of what bounds it, and where that is the same of all together."""
    seconds = each.seconds or {"compute": each.work.flops, "links": each.work.link_bytes}
    tokens = each.work.tokens
    return round(max(seconds.values()) / tokens, 12), sum(seconds.values()) / tokens


def _takes_more(each: UncompiledPlan, other: UncompiledPlan) -> bool:
    """Whether a step has as many copies, and rows a chip, as another, and keeps as much of them."""

    def size(one: UncompiledPlan) -> tuple[int, ...]:
        stage, mesh = one.stage, one.mesh.shape
        kept = -REMAT.index(one.config.remat)
        return mesh["data"], stage.batch_size // stage.micro_batches, kept

    return each.mesh.shape["tensor"] == other.mesh.shape["tensor"] and all(
        a >= b for a, b in zip(size(each), size(other), strict=True)
    )


def remedies(planned: UncompiledPlan) -> Iterator[tuple[str, TrainConfig]]:
    """Flags that make a stage smaller, each with those before it, the least change first.

    Layers are computed again, the batch passes in more parts, parameters are split over all chips
    (at first, if they fill half of a chip), rows are split by their positions, and at last adapters
    are trained in place of all parameters.

    Args:
      planned: what does not fit.
    """
    stage, capacity = planned.stage, planned.chip.memory or 0
    name, shape = stage.name, dict(planned.mesh.shape)
    rows, parts = shape["data"] * shape["fsdp"], stage.micro_batches
    numbers = [parts * two for two in _divisors(stage.batch_size // (parts * rows))[1:]]
    whole = {"mesh.data": 1, "mesh.fsdp": rows} if shape["data"] > 1 else {}
    smaller: list[dict[str, Any]] = []
    if stage.objective.policy.remat != "full":
        smaller.append({"remat": "full"})
    smaller += [{f"{name}.micro_batches": number} for number in numbers]
    at = 0 if 2 * sum(planned.lasting.values()) > capacity else len(smaller)
    smaller[at:at] = [whole] if whole else []
    parts = numbers[-1] if numbers else parts
    if stage.batch_size == parts * rows and rows % 2 == 0 and shape["sequence"] == 1:
        halved = {"mesh.data": 1, "mesh.fsdp": rows // 2, "mesh.sequence": 2}
        smaller.append(halved | {f"{name}.micro_batches": 2 * parts})
    with_lora = _with(planned.config, ["lora", "rank"], RANK)
    if stage.adapter_scale is None and planned.kind.adapters(with_lora) is not None:
        smaller.append({"lora.rank": RANK})
    config, given = planned.config, {}
    for fields in smaller:
        given |= fields
        for field, value in fields.items():
            config = _with(config, field.split("."), value)
        flags = (f"--{field.replace('_', '-')} {value}" for field, value in given.items())
        yield " ".join(flags), config


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """The config with another value at a path of fields."""
    name, *rest = path
    changed = _with(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: changed})


def least_chips(planned: UncompiledPlan) -> int | None:
    """Chips that hold what stays between steps, all of it split; None where they have no limit."""
    if planned.chip.memory is None:
        return None
    split = planned.mesh.size // planned.mesh.shape["data"]
    return -(-sum(planned.lasting.values()) * split // planned.chip.memory)
