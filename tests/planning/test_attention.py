"""Attention compiled for a TPU: the kernels against blocks, one layer and slices of two."""

import importlib.util

import jax.numpy as jnp
import pytest

from jaxalign.models import DecoderConfig
from jaxalign.planning.attention import attention_costs
from jaxalign.planning.topologies import slice_devices, slices_of
from jaxalign.sharding import make_mesh
from jaxalign.training.stage import Rows

CONFIG = DecoderConfig(
    vocab_size=64,
    width=512,
    layers=1,
    heads=4,
    kv_heads=2,
    head_width=128,
    mlp_width=512,
    context_length=2048,
)
ROWS = Rows(rows=8, length=2048, scored=1024, forward=1)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is an extra"
)


@needs_compiler
def test_kernels_take_less_memory_and_traffic_than_blocks():
    devices, _ = slice_devices("v5p:2x2x1")
    mesh = make_mesh(fsdp=2, tensor=2, devices=devices, data=1)
    flash, blocked = attention_costs(CONFIG, ROWS, mesh, dtype=jnp.bfloat16, micro_batches=2)
    assert (flash.implementation, blocked.implementation) == ("flash", "blocked")
    assert flash.temporaries < blocked.temporaries / 2
    queries, keys = 2 * 2048 * 2 * 128 * 2, 2 * 2048 * 128 * 2  # bytes on a chip
    scores = 2 * 2 * 2048 * 2048 * 4
    assert flash.traffic > 2 * (2 * queries + 2 * keys)  # read and written, with the gradients
    assert flash.traffic < scores * 3 < blocked.traffic


@needs_compiler
def test_several_slices_are_in_order():
    devices, _ = slice_devices("2xv5p:2x2x1")
    assert slices_of(devices) == 2
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4


def test_other_devices_have_no_kernels():
    mesh = make_mesh(fsdp=8)
    assert attention_costs(CONFIG, ROWS, mesh, dtype=jnp.float32, micro_batches=1) == []
