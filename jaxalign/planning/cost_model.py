"""Cost of a training step on each device, by formula: FLOPs, memory traffic, collectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.models import DecoderConfig
from jaxalign.models.config import ModelConfig
from jaxalign.models.score import SCORE
from jaxalign.sharding import parameter_parts, row_parts
from jaxalign.training.stage import Rows
from jaxalign.training.throughput import active_fraction, matrix_parameters

Params = Any


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one device in a step.

    Attributes:
      tokens: tokens of the rows with a backward pass, on all devices together.
      model_flops: 2 per token and matrix parameter in each forward pass, 4 in each backward pass (2
        if only adapters are trained); utilisation is defined by these.
      flops: model FLOPs, attention's own products and recomputation.
      memory_bytes: lower bound: the weights of every pass, and the update of parameters and
        moments.
      links: lower bound of bytes received over links, by kind of collective.
      network: lower bound of bytes received over the network between slices: sums of gradients.
    """

    tokens: int
    model_flops: float
    flops: float
    memory_bytes: float
    links: dict[str, float]
    network: float = 0.0

    @property
    def link_bytes(self) -> float:
        """Bytes of all kinds."""
        return sum(self.links.values())


def work(
    model_config: ModelConfig,
    params: Params,
    trained: Params,
    passes: Sequence[Rows],
    mesh: Mesh,
    *,
    moments: int,
    adapters: bool,
    remat: str,
    dtype: Any,
    micro_batches: int = 1,
    slices: int = 1,
) -> Work:
    r"""FLOPs and bytes of a step on each of the devices of a mesh.

    A row's matrix products are :math:`2 \sum_W |W| n_W` FLOPs forward and twice that backward (once
    if only adapters are trained: no gradients of weights), with :math:`n_W` the positions that
    matrix W multiplies; attention adds :math:`4 l \sum_q n_q` (queries by keys and weights by
    values, all keys of a row, or of a packed row those that a token may see) forward and twice that
    backward.

    Args:
      model_config: the architecture, of a decoder or an encoder-decoder.
      params: shapes of the model's parameters.
      trained: shapes of the trained ones.
      passes: of a step.
      mesh: of the devices.
      moments: bytes of the optimiser's state, of all devices together.
      adapters: whether only adapters are trained.
      remat: what is recomputed: none, full (one more forward pass) or dots (attention).
      dtype: of the computation.
      micro_batches: number of parts of the batch, each of which reads all weights.
      slices: number of slices, over which only replicas are spread: data is a multiple of it.
    """
    again = 2 * (remat == "full")
    attention_again = 2 * (remat in ("full", "dots"))
    useful = extra = 0.0
    active = active_fraction(model_config)
    for each in passes:
        products = each.rows * _products(params, each, active)
        attention = each.rows * _attention_products(model_config, each)
        useful += products * (2 * each.forward + (2 if adapters else 4) * each.backward)
        extra += products * again * each.backward
        extra += attention * (2 * each.forward + (4 + attention_again) * each.backward)
    learned = [each for each in passes if each.backward]
    tensor, size = mesh.shape["tensor"], jnp.dtype(dtype).itemsize
    through = sum((each.forward + each.backward) * each.depth for each in passes)
    read = matrix_parameters(params) / tensor * size * through * micro_batches
    moved = sum(x.size for x in jax.tree.leaves(trained))
    split = 1 if adapters else tensor * parameter_parts(mesh)
    links = _gathered(params, passes, mesh, size * micro_batches)
    reduced, network = _reduced(moved, mesh, size * micro_batches, adapters=adapters, slices=slices)
    links |= reduced
    links |= _states(model_config, passes, mesh, size, again=bool(again))
    return Work(
        tokens=sum(each.tokens for each in learned),
        model_flops=useful / mesh.size,
        flops=(useful + extra) / mesh.size,
        memory_bytes=read + 2 * (4 * moved + moments) / split,
        links={kind: amount for kind, amount in links.items() if amount},
        network=network,
    )


def _products(params: Params, each: Rows, active: float) -> float:
    """Sum over matrices of parameters times positions of a row that they multiply, for one pass."""
    tied = "embed" in params and not {"unembed", SCORE} & set(params)
    total = float(params["embed"]["embedding"].size * each.scored if tied else 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        if names[-1] != "kernel":
            continue
        if names[0] == "unembed":
            positions: float = each.scored
        elif names[0] == SCORE:
            positions = 1
        elif names[0] == "decoder" and not ("cross" in names and names[-2] in "kv"):
            positions = each.scored * each.depth
        else:
            positions = each.length * each.depth
        total += leaf.size * positions * (active if "experts" in names else 1.0)
    return total


def _attention_products(model_config: ModelConfig, each: Rows) -> float:
    """Products of queries with keys and of weights with values of a row, for one pass."""
    seen = min(each.length, each.reach or each.length)
    pairs = each.length * seen * model_config.layers
    if isinstance(model_config, DecoderConfig):
        windowed, window = sum(model_config.windowed), model_config.window or each.length
        pairs -= windowed * each.length * max(seen - window, 0)
    else:
        pairs += model_config.decoder_layers * each.scored * (each.scored + each.length)
    return 2 * model_config.heads * model_config.head_width * pairs * each.depth


def _gathered(params: Params, passes: Sequence[Rows], mesh: Mesh, size: int) -> dict[str, float]:
    """Weights sharded over fsdp and sequence, gathered in every pass."""
    parts = parameter_parts(mesh)
    experts = matrix_parameters(params) - matrix_parameters(params, active=0.0)
    # The experts of a device stay there: their shards are those of fsdp and sequence alone.
    own = mesh.shape["fsdp"] * mesh.shape["sequence"]
    table = params["embed"]["embedding"].size
    needed = sum(
        matrix_parameters(params, active=0.0) * each.depth * (each.forward + each.backward)
        + table * each.forward
        for each in passes
    )
    through = sum(each.depth * (each.forward + each.backward) for each in passes)
    here = experts / mesh.shape["expert"] * through
    amount = _missing(parts) * needed + _missing(own) * here
    return {"all-gather of weights": amount / mesh.shape["tensor"] * size}


def _reduced(
    moved: int, mesh: Mesh, size: int, *, adapters: bool, slices: int
) -> tuple[dict[str, float], float]:
    """Gradients: scattered over shards of parameters, summed over replicas, then over slices."""
    copies, parts = mesh.shape["data"] // slices, parameter_parts(mesh)
    if adapters:  # small, replicated
        copies, parts = copies * parts, 1
    own = moved / (1 if adapters else mesh.shape["tensor"]) * size
    links = {
        "reduce-scatter of gradients": _missing(parts) * own,
        "all-reduce of gradients": 2 * _missing(copies) * own / parts,
    }
    return links, 2 * _missing(slices) * own / parts / copies


def _states(
    model_config: ModelConfig, passes: Sequence[Rows], mesh: Mesh, size: int, *, again: bool
) -> dict[str, float]:
    """Hidden states summed over tensor; keys and values gathered over sequence."""
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    groups, experts = row_parts(mesh), mesh.shape["expert"]
    kv_heads = getattr(model_config, "kv_heads", model_config.heads)
    summed = gathered = mixed = 0.0
    for each in passes:
        # one sum after attention and one after the MLP; the first is recomputed
        sums = 2 * (each.forward + each.backward) + again * each.backward
        reads = each.forward + each.backward
        positions = each.length * model_config.layers
        keys = positions
        if not isinstance(model_config, DecoderConfig):
            positions += 3 / 2 * each.scored * model_config.decoder_layers  # attends twice
            keys += (each.length + each.scored) * model_config.decoder_layers
        rows = each.rows / groups * each.depth
        summed += rows * positions * model_config.width / sequence * sums
        if getattr(model_config, "experts", None) is not None:  # gathered, then scattered back
            mixed += rows * experts * positions * model_config.width / sequence * 2 * reads
        gathered += rows * keys * 2 * kv_heads * model_config.head_width / tensor * reads
    return {
        "all-reduce of states": 2 * _missing(tensor) * summed * size,
        "exchange of experts' tokens": _missing(experts) * mixed * size,
        "all-gather of keys and values": _missing(sequence) * gathered * size,
    }


def _missing(parts: int) -> float:
    """The fraction of an array that is missing on a device with one of its shards."""
    return (parts - 1) / parts


def bound(work: Work, rates: dict[str, float | None]) -> dict[str, float]:
    """Lower bounds of a step's seconds, by what limits it.

    Args:
      work: of one device.
      rates: "compute" in FLOP/s, "memory", "links" and "network" in bytes per second; None:
        unknown.
    """
    amounts = {"compute": work.flops, "memory": work.memory_bytes, "links": work.link_bytes}
    amounts |= {"network": work.network}
    return {name: amounts[name] / rate for name, rate in rates.items() if rate}
