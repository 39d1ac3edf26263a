"""Functions with a rule for reverse mode, which programs in forward mode compute without it."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

_FORWARD: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Programs traced inside can be differentiated by `jax.jvp`.

    `jax.custom_vjp` and fused attention have rules for reverse mode alone.
    """
    token = _FORWARD.set(True)
    try:
        yield
    finally:
        _FORWARD.reset(token)


def in_forward_mode() -> bool:
    """Whether a program is traced inside `forward_mode`."""
    return _FORWARD.get()


def with_reverse_rule(
    function: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    constants: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`function` with a rule for reverse mode; inside `forward_mode`, the plain function.

    Args:
      function: to differentiate.
      forward: as in `jax.custom_vjp.defvjp`.
      backward: as in `jax.custom_vjp.defvjp`.
      constants: indices of arguments that are not arrays (`nondiff_argnums`).
    """
    in_reverse = jax.custom_vjp(function, nondiff_argnums=constants)
    in_reverse.defvjp(forward, backward)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if in_forward_mode() else in_reverse(*arguments)

    return call
