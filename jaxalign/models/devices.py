"""The devices that models compile for, and how a batch's states are sharded over them.

Both are set by the caller while a program is traced.
"""

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

CPU_FLAGS = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""How Linux names the instructions that multiply bfloat16 numbers."""

_TARGET: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar(
    "target", default=None
)


_BFLOAT16_UNITS: contextvars.ContextVar[bool | None] = contextvars.ContextVar(
    "bfloat16_units", default=None
)


_SHARDINGS: contextvars.ContextVar[tuple[NamedSharding, NamedSharding, NamedSharding] | None] = (
    contextvars.ContextVar("shardings", default=None)
)


def enable_compilation_cache() -> None:
    """Keep all compiled programs on disk, unless the user has set this otherwise.

    Small programs are kept too: a command has about a hundred of them, which together take longer
    to compile than a small model's step. JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path.home() / ".cache" / "jaxalign" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def platform() -> str:
    """The platform's name: cpu, gpu or tpu."""
    target = _TARGET.get()
    return jax.default_backend() if target is None else target[0]


def device_count() -> int:
    """Number of devices that share the work."""
    target = _TARGET.get()
    return jax.device_count() if target is None else target[1]


def is_single_cpu() -> bool:
    """Whether rows are processed one by one, for the cache, rather than all at once."""
    return platform() == "cpu" and device_count() == 1


def has_bfloat16_units() -> bool:
    """Whether the device is a single CPU with units for bfloat16 products: AVX-512 BF16 or AMX."""
    forced = _BFLOAT16_UNITS.get()
    return is_single_cpu() and (_bfloat16_in(CPU_FLAGS) if forced is None else forced)


@functools.cache
def _bfloat16_in(flags: Path) -> bool:
    """Whether a file like Linux's /proc/cpuinfo names bfloat16 units; False without the file."""
    if not flags.exists():
        return False
    return not BFLOAT16_FLAGS.isdisjoint(flags.read_text().split())


@contextlib.contextmanager
def bfloat16_units(present: bool) -> Iterator[None]:
    """Programs traced inside are written for a CPU with or without bfloat16 units."""
    token = _BFLOAT16_UNITS.set(present)
    try:
        yield
    finally:
        _BFLOAT16_UNITS.reset(token)


@contextlib.contextmanager
def compiling_for(platform: str, devices: int) -> Iterator[None]:
    """Programs traced inside are written for these devices."""
    token = _TARGET.set((platform, devices))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def splitting_states(
    states: NamedSharding, tables: NamedSharding, heads: NamedSharding
) -> Iterator[None]:
    """Programs traced inside shard a batch's states as `states` says.

    Args:
      states: sharding of the first two axes of states [rows, length, ...].
      tables: sharding of an embedding [ids, width] while rows are looked up in it.
      heads: sharding of queries, keys and values [rows, length, heads, head_width].
    """
    token = _SHARDINGS.set((states, tables, heads))
    try:
        yield
    finally:
        _SHARDINGS.reset(token)


def by_rows(x: jax.Array) -> jax.Array:
    """States [rows, length, ...] sharded by rows and length alone, inside `splitting_states`.

    On the residual stream this keeps the compiler from sharding states by width, as parameters
    are, and repeating every row's work on every device.
    """
    shardings = _SHARDINGS.get()
    return x if shardings is None else _constrained(x, shardings[0])


def as_table(x: jax.Array) -> jax.Array:
    """An embedding for a lookup: its width is not sharded inside `splitting_states`."""
    shardings = _SHARDINGS.get()
    return x if shardings is None else _constrained(x, shardings[1])


def splits_length() -> bool:
    """Whether several devices share the positions of a row."""
    shardings = _SHARDINGS.get()
    return shardings is not None and parts(shardings[0], 1) > 1


def state_sharding() -> NamedSharding | None:
    """How states [rows, length, ...] are sharded; None: unknown."""
    shardings = _SHARDINGS.get()
    return None if shardings is None else shardings[0]


def head_sharding() -> NamedSharding | None:
    """How queries, keys and values [rows, length, heads, head_width] are sharded; None: unknown."""
    shardings = _SHARDINGS.get()
    return None if shardings is None else shardings[2]


def whole_length(x: jax.Array) -> jax.Array:
    """[rows, length, ...] with all positions of a row on each device that has any of them."""
    shardings = _SHARDINGS.get()
    if shardings is None or not splits_length() or x.shape[0] % parts(shardings[0], 0):
        return x
    spec = P(shardings[0].spec[0], None, *[P.UNCONSTRAINED] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(shardings[0].mesh, spec))


def parts(sharding: NamedSharding, axis: int) -> int:
    """How many pieces an axis is cut into."""
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[name] for name in names)


def _constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array with this sharding; an axis that does not divide stays whole."""
    if x.shape[0] % parts(sharding, 0):
        return x
    axes = [
        name if x.shape[axis] % parts(sharding, axis) == 0 else None
        for axis, name in enumerate(sharding.spec)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, P(*axes)))
