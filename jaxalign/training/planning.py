"""Programs compiled for devices that need not be there, and the memory that they take on these."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxalign.models.devices import compiling_for
from jaxalign.sharding import batch_sharding, parameter_shardings
from jaxalign.training.step import TrainState, compile_step

Structs = Any
"""A tree of `jax.ShapeDtypeStruct`."""


class TooLargeError(Exception):
    """The compiler found no room; `sizes`: bytes needed and bytes there are, where it says so."""

    def __init__(self, text: str):
        super().__init__(text)
        sizes = re.findall(r"([\d.]+)([KMG])", text.split("HBM", 1)[-1])
        self.sizes = [float(number) * 1024 ** ("KMG".index(unit) + 1) for number, unit in sizes[:2]]


def placed_parameters(tree: Structs, mesh: Mesh) -> Structs:
    """Shapes of parameters, or of what mirrors them, where a run places them.

    What lies in the tree twice does so in the result; numbers stay.
    """
    shardings, known = parameter_shardings(tree, mesh), {}

    def place(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, float):
            return x
        made = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return known.setdefault(id(x), made)

    return jax.tree.map(place, tree, shardings)


def placed_batch(tree: Structs, mesh: Mesh) -> Structs:
    """Shapes of a batch, its rows split as a run splits them."""
    rows = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def bytes_on_device(tree: Structs) -> int:
    """Bytes of a tree of placed shapes on one device; what lies in it twice counts once."""
    leaves = {id(x): x for x in jax.tree.leaves(tree) if not isinstance(x, float)}
    return sum(
        jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in leaves.values()
    )


def lasting_memory(state: TrainState, frozen: Structs, batch: Structs) -> dict[str, int]:
    """Bytes on one device between the steps: by the rules of sharding alone, nothing compiled.

    Args:
      state: placed shapes.
      frozen: placed shapes of what the step reads and never changes.
      batch: placed shapes.
    """
    return {
        "parameters": bytes_on_device(state.params),
        "optimizer": bytes_on_device(state.opt_state),
        "frozen": bytes_on_device(frozen),
        "batch": bytes_on_device(batch),
    }


def step_memory(
    step: Callable[..., Any], state: TrainState, frozen: Structs, batch: Structs, mesh: Mesh
) -> dict[str, int]:
    """Compile a step for a mesh and read what it takes beside the lasting memory, on one device.

    Args:
      step: (state, frozen, batch) -> (state, metrics).
      state: placed shapes.
      frozen: placed shapes.
      batch: placed shapes.
      mesh: of devices that need not be there.

    Returns:
      Bytes of "temporaries" (gradients, activations and all else that a step makes) and of the
      "program".

    Raises:
      TooLargeError: the compiler says that it does not fit.
    """
    return program_memory(compile_step(step, state, mesh), mesh, state, frozen, batch)


def program_memory(program: jax.stages.Wrapped, mesh: Mesh, *arguments: Any) -> dict[str, int]:
    """Compile any program for a mesh; as `step_memory`."""
    try:
        with compiling_for(mesh.devices.flat[0].platform, mesh.size):
            compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(str(error).splitlines()[0]) from None
    used: Any = compiled.memory_analysis()
    return {
        "temporaries": used.temp_size_in_bytes,
        "program": used.generated_code_size_in_bytes,
    }
