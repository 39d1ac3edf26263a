"""Rematerialisation by memory: what the backward pass recomputes so that activations fit."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.training.micro_batches import split_micro_batches
from jaxalign.training.objectives import Objective

CHOICES = ("none", "dots", "full")
"""Ways to rematerialise, from the one that keeps most."""
FASTEST = {"cpu": ("dots", "full"), "gpu": ("dots", "full")}
"""Those to choose from, the fastest first; on other platforms all. On these, storing all
activations takes more time than recomputing all but matrix products (`python -m
benchmarks.real_pairs --remat none dots full`; `python -m benchmarks.gpu`)."""
MARGIN = 0.8
"""Fraction of the free memory to fill: sizes are estimates."""


def saved_bytes(
    objective: Objective, trained: Any, frozen: Any, batch: Any, *, micro_batches: int = 1
) -> int:
    """Bytes that the forward pass keeps for the backward pass, of all devices together.

    They are read from the traced derivative: nothing is compiled or computed. Parameters, which are
    kept anyway, do not count.

    Args:
      objective: what is minimised.
      trained: shapes of the trained parameters.
      frozen: shapes of what the step reads and never changes.
      batch: shapes of a batch.
      micro_batches: number of parts of the batch.
    """

    def kept(trained: Any, frozen: Any, batch: Any) -> Any:
        part = batch
        if micro_batches > 1:
            part = jax.tree.map(lambda x: x[0], split_micro_batches(batch, micro_batches))

        def forward(trained: Any) -> Any:
            return objective.forward(trained, frozen, part, jax.random.key(0))

        return jax.tree.leaves(jax.vjp(forward, trained)[1])

    known = Counter((x.shape, x.dtype) for x in jax.tree.leaves((trained, frozen)))
    total = 0
    for x in jax.eval_shape(kept, trained, frozen, batch):
        key = x.shape, x.dtype
        if known[key]:
            known[key] -= 1
        elif not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            total += math.prod(x.shape) * x.dtype.itemsize
    return total


def choose(
    activations: Callable[[str], float], other: int, free: int | None, *, platform: str
) -> tuple[str, float]:
    """The fastest rematerialisation that fits, and the bytes of its activations.

    Args:
      activations: one of `CHOICES` -> bytes on a device; called only as often as needed.
      other: bytes of gradients, optimiser state and everything else on the device.
      free: free bytes of the device; None: unknown, so the fastest is chosen.
      platform: of the device, as jax names it.

    Returns:
      The choice and its bytes; "full" where nothing fits.
    """
    choices = FASTEST.get(platform, CHOICES)
    needed = math.nan
    for choice in choices:
        needed = activations(choice)
        if free is None or needed + other <= MARGIN * free:
            return choice, needed
    return choices[-1], needed


def free_memory(device: Any, root: Path = Path("/")) -> int | None:
    """Free bytes of a device; None: unknown.

    Args:
      device: of this process; the devices of a CPU share its memory.
      root: of the file system with Linux's /proc and /sys.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    free = [x for x in (_available(root), *_left_in_groups(root)) if x is not None]
    return min(free) // jax.local_device_count() if free else None


def _available(root: Path) -> int | None:
    """Available bytes of the machine."""
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _left_in_groups(root: Path) -> list[int]:
    """Bytes left within the limits of this process's control groups, version 1 or 2."""
    left = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        if not controllers:
            limit, used = "memory.max", "memory.current"
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):  # the limits of parent groups also apply
            if not folder.is_relative_to(base):
                break
            limit_bytes, used_bytes = (_number(folder / name) for name in (limit, used))
            if limit_bytes is not None and used_bytes is not None:
                left.append(max(limit_bytes - used_bytes + _reclaimable(folder), 0))
    return left


def _reclaimable(folder: Path) -> int:
    """Bytes of a group's page cache, which count as used but can be freed."""
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() and int(lines[0]) < 2**60 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def in_words(bytes_: float | int) -> str:
    """1.3e9 -> 1.2 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if bytes_ >= size:
            value = bytes_ / size
            return f"{value:.1f} {unit}" if value < 10 else f"{np.round(value):.0f} {unit}"
    return "under 1 MiB"
