"""One layer's attention on a TPU in each of its implementations, by the compiler."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models import DecoderConfig
from jaxalign.models.attention import attention
from jaxalign.models.config import ModelConfig
from jaxalign.models.devices import compiling_for
from jaxalign.planning.compiled import TooLargeError, compiled_for
from jaxalign.sharding import row_parts
from jaxalign.training.stage import Rows


@dataclass(frozen=True, kw_only=True)
class AttentionCost:
    """Attention of one layer on one chip, forward and backward."""

    implementation: str
    temporaries: int
    """Bytes beside queries, keys, values and their gradients."""
    traffic: float
    """Bytes of what operations read and write; the kernels' are by formula."""


def attention_costs(
    model_config: ModelConfig, rows: Rows, mesh: Mesh, *, dtype: Any, micro_batches: int
) -> list[AttentionCost]:
    """Costs of the kernels and of attention in blocks for the rows of a chip, without a window.

    Args:
      model_config: the architecture.
      rows: of a pass.
      mesh: of the slice.
      dtype: of the computation.
      micro_batches: number of parts of the batch.

    Returns:
      A cost for each implementation that fits; none for other devices, for encoder-decoders, for
      packed rows, and where the positions of a row are sharded.
    """
    device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
    if device.platform != "tpu" or not isinstance(model_config, DecoderConfig):
        return []
    if mesh.shape["sequence"] > 1 or model_config.kv_heads % tensor or rows.reach is not None:
        return []
    number = rows.rows // (row_parts(mesh) * micro_batches)
    kv_heads, groups = model_config.kv_heads // tensor, model_config.heads // model_config.kv_heads
    whole = NamedSharding(Mesh(np.asarray([device]), "chip"), P())

    def compiled(number: int, kv_heads: int, run: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            return run(q, k, v).sum()

        q, k = (
            jax.ShapeDtypeStruct(
                (number, rows.length, heads, model_config.head_width), dtype, sharding=whole
            )
            for heads in (kv_heads * groups, kv_heads)
        )
        with compiling_for("tpu", 1):
            return compiled_for(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), q, k, k)

    costs = []
    for implementation in ("flash", "blocked"):
        run = functools.partial(
            attention,
            scale=model_config.scale,
            cap=model_config.attention_softcap,
            implementation=implementation,
        )
        try:
            one = compiled(number, kv_heads, run)
            if implementation == "flash":
                traffic = one.cost_analysis()["bytes accessed"]
            else:  # of a loop the compiler counts one step: all queries in one block, for one head
                at_once = functools.partial(run, query_block=rows.length)
                head = compiled(1, 1, jax.checkpoint(at_once))
                traffic = head.cost_analysis()["bytes accessed"] * number * kv_heads
        except TooLargeError:
            continue
        costs.append(
            AttentionCost(
                implementation=implementation,
                temporaries=one.memory_analysis().temp_size_in_bytes,
                traffic=traffic,
            )
        )
    return costs
