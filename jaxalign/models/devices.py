"""What the models know of the devices: which they are, and how these share the rows of a batch.

Both are set around the tracing of a program, by whoever compiles it.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

_TARGET: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar(
    "target", default=None
)


_PLACES: contextvars.ContextVar[tuple[NamedSharding, NamedSharding] | None] = (
    contextvars.ContextVar("places", default=None)
)


def platform() -> str:
    """The platform's name: cpu, gpu or tpu."""
    target = _TARGET.get()
    return jax.default_backend() if target is None else target[0]


def number() -> int:
    """How many devices share the work."""
    target = _TARGET.get()
    return jax.device_count() if target is None else target[1]


@contextlib.contextmanager
def compiling_for(platform: str, devices: int) -> Iterator[None]:
    """What is traced inside takes the forms that these devices run best."""
    token = _TARGET.set((platform, devices))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def splitting_rows(rows: NamedSharding, tables: NamedSharding) -> Iterator[None]:
    """What is traced inside keeps a batch's rows where `rows` puts them.

    Args:
      rows: of anything whose first axis is a batch's rows.
      tables: of an embedding [ids, width] while rows are looked up in it.
    """
    token = _PLACES.set((rows, tables))
    try:
        yield
    finally:
        _PLACES.reset(token)


def by_rows(x: jax.Array) -> jax.Array:
    """States [rows, ...] split over devices by rows alone, inside `splitting_rows`.

    Said of the residual stream, it keeps the compiler from splitting states by width, as it splits
    the parameters, and repeating every row's work on every device.
    """
    places = _PLACES.get()
    return x if places is None else _placed(x, places[0])


def as_table(x: jax.Array) -> jax.Array:
    """An embedding as rows are looked up in it, its width in one piece, inside `splitting_rows`."""
    places = _PLACES.get()
    return x if places is None else _placed(x, places[1])


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    axes = sharding.spec[0] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    return x if x.shape[0] % parts else jax.lax.with_sharding_constraint(x, sharding)
