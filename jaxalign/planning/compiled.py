"""Programs compiled for devices that need not exist, and the memory that they need there."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.models.devices import compiling_for
from jaxalign.sharding.structs import Structs, bytes_on_device
from jaxalign.training.step import TrainState, compile_step


class TooLargeError(Exception):
    """A program does not fit; `sizes` has the bytes needed and available, if the compiler says."""

    def __init__(self, text: str):
        super().__init__(text)
        sizes = re.findall(r"([\d.]+)([KMG])", text.split("HBM", 1)[-1])
        self.sizes = [float(number) * 1024 ** ("KMG".index(unit) + 1) for number, unit in sizes[:2]]


def lasting_memory(state: TrainState, frozen: Structs, batch: Structs) -> dict[str, int]:
    """Bytes on one device between steps, by the sharding rules, without compiling.

    Args:
      state: placed shapes.
      frozen: placed shapes of what the step reads and never changes.
      batch: placed shapes.
    """
    moving = {} if state.reference is None else {"reference": bytes_on_device(state.reference)}
    return {
        "parameters": bytes_on_device(state.params),
        "optimizer": bytes_on_device(state.opt_state),
        **moving,
        "frozen": bytes_on_device(frozen),
        "batch": bytes_on_device(batch),
    }


def step_memory(
    step: Callable[..., Any], state: TrainState, frozen: Structs, batch: Structs, mesh: Mesh
) -> dict[str, int]:
    """Compile a step for a mesh; bytes on one device in addition to the lasting memory.

    Args:
      step: (state, frozen, batch) -> (state, metrics).
      state: placed shapes.
      frozen: placed shapes.
      batch: placed shapes.
      mesh: of devices that need not exist.

    Returns:
      Bytes of "temporaries" (gradients, activations and everything else in a step) and of the
      "program".

    Raises:
      TooLargeError: it does not fit.
    """
    return program_memory(compile_step(step, state, mesh), mesh, state, frozen, batch)


def program_memory(program: jax.stages.Wrapped, mesh: Mesh, *arguments: Any) -> dict[str, int]:
    """The same as `step_memory` for any program."""
    with compiling_for(mesh.devices.flat[0].platform, mesh.size):
        used: Any = compiled_for(program, *arguments).memory_analysis()
    return {
        "temporaries": used.temp_size_in_bytes,
        "program": used.generated_code_size_in_bytes,
    }


def compiled_for(program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """A program compiled for the devices of its arguments.

    Raises:
      TooLargeError: it does not fit.
    """
    try:
        return program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(str(error).splitlines()[0]) from None
