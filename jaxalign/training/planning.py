"""A training step compiled for devices that need not be there, and what it would cost on them."""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxalign.data.batches import PairBatch
from jaxalign.models.devices import compiling_for
from jaxalign.sharding import batch_sharding, parameter_shardings
from jaxalign.training.objectives import Objective, ReferencedBatch
from jaxalign.training.step import compile_step, initial_state, train_step
from jaxalign.training.throughput import matrix_parameters
from jaxalign.training.watching import Watch

Params = Any


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device: what lies there between steps, and what a step takes on top."""

    parameters: int
    optimizer: int
    frozen: int
    batch: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        """All of it."""
        lasting = self.parameters + self.optimizer + self.frozen + self.batch
        return lasting + self.temporaries + self.program


class TooLargeError(Exception):
    """The compiler found no room: bytes needed and bytes there are, or None where it is silent."""

    def __init__(self, text: str):
        super().__init__(text)
        sizes = re.findall(r"([\d.]+)([KMG])", text.split("HBM", 1)[-1])
        self.sizes = [float(number) * 1024 ** ("KMG".index(unit) + 1) for number, unit in sizes[:2]]


def pair_structs(
    pairs: int, length: int, response: int, *, reference: bool, joint_share: float = 0.0
) -> ReferencedBatch:
    """Shapes of a batch of pairs, nothing in them; joint rows as `pair_batches` makes them."""
    joint = length + response
    joint = joint if joint <= joint_share * 2 * length else None

    def batch() -> ReferencedBatch:
        return ReferencedBatch(
            pairs=PairBatch(
                tokens=jnp.zeros((pairs, 2, length), jnp.int32),
                prompt_length=jnp.zeros((pairs, 2), jnp.int32),
                response_tokens=jnp.zeros((pairs, 2, response), jnp.int32),
                response_length=jnp.zeros((pairs, 2), jnp.int32),
                record_index=jnp.zeros(pairs, jnp.int32),
                weight=jnp.zeros(pairs),
                joint_tokens=None if joint is None else jnp.zeros((pairs, joint), jnp.int32),
                common_length=None if joint is None else jnp.zeros(pairs, jnp.int32),
            ),
            reference=jnp.zeros((pairs, 2)) if reference else None,
        )

    return jax.eval_shape(batch)


def compiled_memory(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    trained: Params,
    frozen: Any,
    batch: ReferencedBatch | PairBatch,
    mesh: Mesh,
    *,
    micro_batches: int = 1,
    watch: Watch | None = None,
) -> Memory:
    """Compile the training step for a mesh and read what the compiler reserves on each device.

    Args:
      objective: what is minimised.
      optimizer: the update rule.
      trained: shapes of the trained parameters.
      frozen: shapes of {"policy": ..., "reference": ...}, None where there is none.
      batch: shapes of a batch.
      mesh: of devices that need not be there.
      micro_batches: parts in which the batch passes.
      watch: what the step sees of its pairs.

    Raises:
      TooLargeError: the compiler says that it does not fit.
    """
    one_copy = frozen["policy"] is frozen["reference"]
    state = jax.eval_shape(lambda: initial_state(_zeros(trained), optimizer, seed=0))
    state = _placed(state, parameter_shardings(state, mesh))
    frozen = _placed(frozen, parameter_shardings(frozen, mesh))
    rows = batch_sharding(mesh)
    batch = _placed(batch, jax.tree.map(lambda _: rows, batch))
    step = functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        micro_batches=micro_batches,
        watch=watch,
    )
    platform = mesh.devices.flat[0].platform
    try:
        with compiling_for(platform, mesh.size):
            compiled = compile_step(step, state, mesh).lower(state, frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(str(error).splitlines()[0]) from None
    used: Any = compiled.memory_analysis()
    return Memory(
        parameters=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        frozen=_bytes(frozen["reference"] if one_copy else frozen),
        batch=_bytes(batch),
        temporaries=used.temp_size_in_bytes,
        program=used.generated_code_size_in_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one device does in a step, by formula.

    Attributes:
      tokens: that pass the network, of all devices together.
      model_flops: 6 per matrix parameter and token (and 2 for a live reference), attention left
        out: what utilisation is counted in.
      flops: with attention's products and with what is computed again.
      memory_bytes: at least: the weights of every pass, the update of parameters and moments.
      link_bytes: that come in over links, at least: gathered weights, reduced gradients, with
        tensor parallelism the states that are summed, with split sequences keys and values.
    """

    tokens: int
    model_flops: float
    flops: float
    memory_bytes: float
    link_bytes: float


def work(
    model_config: Any,
    params: Params,
    trained: Params,
    batch: ReferencedBatch,
    mesh: Mesh,
    *,
    moments: int,
    live_reference: bool,
    adapters: bool,
    remat: str,
    dtype: Any,
) -> Work:
    """FLOPs and bytes of a step on each device of a mesh.

    Args:
      model_config: the architecture, of a decoder or an encoder-decoder.
      params: shapes of the model's parameters.
      trained: shapes of the trained ones.
      batch: shapes of a batch.
      mesh: how devices share the work.
      moments: bytes of the optimiser's state, of all devices together.
      live_reference: whether the reference runs in the step.
      adapters: whether adapters alone are trained.
      remat: what is computed again: none, full (a forward pass more) or dots (attention's).
      dtype: of the computation.
    """
    pairs, _, length = batch.pairs.tokens.shape
    joint = batch.pairs.joint_tokens
    rows, length = (2, length) if joint is None else (1, joint.shape[1])
    tokens = rows * pairs * length
    backward, again, reference = (2 if adapters else 4), 2 * (remat == "full"), 2 * live_reference
    matrices = matrix_parameters(params) * tokens
    heads = model_config.heads * model_config.head_width
    attention = 2 * length * heads * model_config.layers * tokens  # of each of 2 FLOPs a product
    recomputed = again or (2 if remat == "dots" else 0)
    passes = 2 + backward + reference
    flops = matrices * (passes + again) + attention * (2 + 4 + reference + recomputed)

    sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    fsdp = mesh.shape["fsdp"] * sequence  # parameters are split over both
    size = jnp.dtype(dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(params)) / tensor
    moved = sum(x.size for x in jax.tree.leaves(trained))
    through = 2 + bool(again) + live_reference  # forward, backward, again, reference
    gathered = (fsdp - 1) / fsdp * weights * size * through
    own = moved / (1 if adapters else tensor)
    reduced = (fsdp - 1) / fsdp * own * 4
    replicas = mesh.shape["data"]
    reduced += 2 * (replicas - 1) / replicas * own / (1 if adapters else fsdp) * 4
    states = tokens / (replicas * fsdp) * model_config.width * size
    layers = model_config.layers
    summed = 2 * (tensor - 1) / tensor * states * layers * (passes + again)
    heads = getattr(model_config, "kv_heads", model_config.heads) / tensor
    keys = 2 * tokens * sequence / (replicas * fsdp) * heads * model_config.head_width * size
    attended = (sequence - 1) / sequence * keys * layers * through
    return Work(
        tokens=tokens,
        model_flops=float(passes * matrices / mesh.size),
        flops=float(flops / mesh.size),
        memory_bytes=weights * size * through + 2 * (4 * moved + moments) / (tensor * fsdp),
        link_bytes=gathered + reduced + summed + attended,
    )


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _placed(tree: Any, shardings: Any) -> Any:
    def place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def _bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape)
        total += int(jnp.dtype(x.dtype).itemsize * functools.reduce(lambda a, b: a * b, shape, 1))
    return total
