"""What the models know of the devices: which they are, and how these share a batch's states.

Both are set around the tracing of a program, by whoever compiles it.
"""

import contextlib
import contextvars
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_TARGET: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar(
    "target", default=None
)


_PLACES: contextvars.ContextVar[tuple[NamedSharding, NamedSharding] | None] = (
    contextvars.ContextVar("places", default=None)
)


def enable_compilation_cache() -> None:
    """Keep all compiled programs on disk, where the user has not said otherwise.

    Small programs, too: a command has about a hundred of them, which together take longer to
    compile than a small model's step. JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
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


def number() -> int:
    """How many devices share the work."""
    target = _TARGET.get()
    return jax.device_count() if target is None else target[1]


def one_cpu() -> bool:
    """Whether rows pass one by one, through the cache, or all at once, spread over devices."""
    return platform() == "cpu" and number() == 1


@contextlib.contextmanager
def compiling_for(platform: str, devices: int) -> Iterator[None]:
    """What is traced inside takes the forms that these devices run best."""
    token = _TARGET.set((platform, devices))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def splitting_states(states: NamedSharding, tables: NamedSharding) -> Iterator[None]:
    """What is traced inside keeps a batch's states where `states` puts them.

    Args:
      states: of the first two axes of states [rows, length, ...].
      tables: of an embedding [ids, width] while rows are looked up in it.
    """
    token = _PLACES.set((states, tables))
    try:
        yield
    finally:
        _PLACES.reset(token)


def by_rows(x: jax.Array) -> jax.Array:
    """States [rows, length, ...] split by rows and length alone, inside `splitting_states`.

    Said of the residual stream, it keeps the compiler from splitting states by width, as it splits
    the parameters, and repeating every row's work on every device.
    """
    places = _PLACES.get()
    return x if places is None else _placed(x, places[0])


def as_table(x: jax.Array) -> jax.Array:
    """An embedding as rows are looked up in it, its width in one piece, if states are split."""
    places = _PLACES.get()
    return x if places is None else _placed(x, places[1])


def splits_length() -> bool:
    """Whether several devices share the positions of a row."""
    places = _PLACES.get()
    return places is not None and _parts(places[0], 1) > 1


def whole_length(x: jax.Array) -> jax.Array:
    """[rows, length, ...] with all positions of a row on each device that has any of them."""
    places = _PLACES.get()
    if places is None or not splits_length() or x.shape[0] % _parts(places[0], 0):
        return x
    spec = P(places[0].spec[0], None, *[P.UNCONSTRAINED] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(places[0].mesh, spec))


def _parts(sharding: NamedSharding, axis: int) -> int:
    """How many pieces an axis is cut into."""
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[name] for name in names)


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array where it should be; an axis that does not divide stays whole."""
    if x.shape[0] % _parts(sharding, 0):
        return x
    axes = [
        name if x.shape[axis] % _parts(sharding, axis) == 0 else None
        for axis, name in enumerate(sharding.spec)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, P(*axes)))
