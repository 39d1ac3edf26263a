"""The kernels, interpreted, = attention written out; they lower for TPUs from any machine."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from jaxalign.errors import UserError
from jaxalign.models import devices, flash
from jaxalign.models.attention import attention
from jaxalign.sharding import head_sharding, make_mesh
from jaxalign.training.step import on_mesh
from tests.models.test_attention import OPTIONS, draw, packed_pairs
from tests.slow import mostly_slow

LENGTH, BLOCK = 67, 16


def kernels(*arrays, **options):
    return attention(*arrays, scale=0.4, implementation="flash", query_block=BLOCK, **options)


def dense(q, k, v, seen, *, window=None, cap=None):
    """The textbook's formula with all scores at once, for gradients; the window is in `seen`."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = 0.4 * jnp.einsum("bqhd,bshd->bhqs", q, k, precision="highest")
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqs,bshd->bqhd", weights, v, precision="highest")


def seen_in(segments, prefixes, positions, window=None, **_):
    """Which keys each query sees, [rows, queries, keys], one pair after the other in NumPy."""
    rows, length = segments.shape
    seen = np.zeros((rows, length, length), bool)
    for row, query, key in np.ndindex(seen.shape):
        one = segments[row, key] in (segments[row, query], prefixes[row, query])
        near = window is None or positions[row, query] - positions[row, key] < window
        seen[row, query, key] = key <= query and one and near
    return jnp.asarray(seen)


def arrays_of(rng, rows=2, length=LENGTH, heads=4, kv_heads=2, width=8):
    return tuple(draw(rng, rows, length, n, width) for n in (heads, kv_heads, kv_heads))


def laid_out(kind, rng):
    """Arguments of `attention` and the arrays of `seen_in`."""
    one = np.ones((2, LENGTH), np.int32)
    places = one.cumsum(1, dtype=np.int32)
    if kind == "plain":
        return {}, (one, one, places)
    if kind == "segments":
        segments = one.copy()
        segments[0, 33:], segments[1, :3], segments[1, 60:] = 2, 0, 0
        return {"segment_ids": jnp.asarray(segments)}, (segments, segments, places)
    drawn = [packed_pairs(rng, LENGTH, 4, 6), packed_pairs(rng, LENGTH, 3, 8)]
    rows = np.stack([x for x, _ in drawn], 1)
    names = "segment_ids", "prefix_ids", "positions"
    layout = dict(zip(names, jnp.asarray(rows), strict=True))
    if kind == "reach":
        layout["reach"] = max(reach for _, reach in drawn)
    return layout, rows


KINDS = ["plain", "segments", "prefixes", "reach"]
QUICK = [
    ("plain", "wide window"),
    ("plain", "cap"),
    ("segments", "window"),
    ("prefixes", "plain"),
    ("prefixes", "cap and window"),
    ("reach", "plain"),
    ("reach", "window"),
]


@pytest.mark.parametrize(
    ("kind", "name"), mostly_slow(itertools.product(KINDS, OPTIONS), quick=QUICK)
)
def test_numbers_and_gradients_are_the_textbooks(kind, name, rng):
    options = OPTIONS[name]
    arrays = arrays_of(rng)
    layout, rows = laid_out(kind, rng)
    real = jnp.asarray(rows[0] > 0)[..., None, None]
    weights = draw(rng, *arrays[0].shape) * real

    def weighed(run, *arrays):
        out = run(*arrays) * real
        return jnp.sum(out * weights), out

    def both(run):
        weigh = functools.partial(weighed, run)
        return jax.jit(jax.grad(weigh, argnums=(0, 1, 2), has_aux=True))(*arrays)

    ours = both(functools.partial(kernels, **layout, **options))
    expected = both(functools.partial(dense, seen=seen_in(*rows, **options), **options))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), ours, expected)


def test_numbers_and_gradients_are_those_of_jaxs_own_kernel(rng):
    """Splash attention of JAX, interpreted, for grouped heads and a window."""
    arrays = arrays_of(rng, rows=1, length=256, heads=2, kv_heads=1, width=128)
    mask = splash_attention_mask.LocalMask((256, 256), (99, 0), 0)
    both = splash_attention_mask.MultiHeadMask([mask] * 2)
    splash = splash_attention_kernel.make_splash_mha_single_device(both, interpret=True)

    def theirs(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2)[0] for x in (q * 0.4, k, v))
        return jnp.swapaxes(splash(q, k, v)[None], 1, 2)

    def gradients(run):
        return jax.jit(jax.grad(lambda *arrays: jnp.sin(run(*arrays)).sum(), argnums=(0, 1, 2)))

    options = {"window": 100, "scale": 0.4, "query_block": 128}
    ours = gradients(functools.partial(attention, implementation="flash", **options))
    expected = gradients(theirs)(*arrays)
    for mine, other in zip(ours(*arrays), expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4)


def test_kernels_read_no_memory_that_is_not_written(rng, monkeypatch):
    """By JAX's simulation of a TPU's memories and copies, where unwritten numbers are NaN."""
    arrays = arrays_of(rng, rows=1, length=24, heads=2, kv_heads=1)
    segments = jnp.asarray(np.repeat([[1, 2, 3]], 8, axis=1))
    layout = {"segment_ids": segments, "prefix_ids": jnp.ones_like(segments)}
    layout |= {"positions": jnp.arange(24)[None], "reach": 24}

    def gradients(run):
        weighed = lambda *arrays: jnp.sin(run(*arrays, scale=0.4, **layout)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*arrays)

    expected = gradients(functools.partial(attention, implementation="blocked"))
    simulated = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    interpreted = flash.pl.pallas_call
    monkeypatch.setattr(
        flash.pl,
        "pallas_call",
        lambda *body, **options: interpreted(*body, **options | {"interpret": simulated}),
    )
    ours = gradients(functools.partial(attention, implementation="flash", query_block=8))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, expected
    )


def test_rows_and_heads_are_split_over_devices(rng):
    arrays, mesh = arrays_of(rng), make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    layout, _ = laid_out("prefixes", rng)

    def run(*arrays):
        loss = lambda *arrays: jnp.sin(kernels(*arrays, **layout)).sum()  # noqa: E731
        return kernels(*arrays), jax.checkpoint(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    with devices.compiling_for("cpu", 1):
        alone = jax.jit(run)(*arrays)
    out, gradients = jax.jit(on_mesh(run, mesh))(*jax.device_put(arrays, head_sharding(mesh)))
    for ours, expected in zip((out, *gradients), (alone[0], *alone[1]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-6)
        assert ours.sharding.is_equivalent_to(head_sharding(mesh), 4)


def test_rows_split_by_position_are_refused(rng):
    arrays, mesh = arrays_of(rng, length=64), make_mesh(data=2, sequence=4)
    with pytest.raises(UserError, match=r"mesh\.sequence"):
        jax.eval_shape(on_mesh(kernels, mesh), *arrays)
    with pytest.raises(UserError, match="not one of auto"):
        attention(*arrays, scale=1.0, implementation="splash")


def test_packed_blocks_read_only_what_they_may_see(rng):
    """No seen key is left out, and most of the causal triangle is."""
    length = 512
    rows, reach = packed_pairs(rng, length, 12, 20)
    marks = np.zeros((1, flash.SUBLANES, length), np.int32)
    marks[0, :4] = np.arange(length), rows[0], rows[1], rows[2]
    form = flash.Form(1.0, None, None, reach, True, True, BLOCK, interpret=True)
    seen = np.asarray(flash._visible(form, jnp.asarray(marks)))[0]
    places = np.arange(length)
    near = places[:, None] - places < reach  # padding, too
    exact = np.asarray(seen_in(*rows[:, None]))[0] & near
    exact = exact.reshape(length // BLOCK, BLOCK, -1, BLOCK).any((1, 3))
    assert not (exact & ~seen).any()
    assert seen.sum() < 1.2 * exact.sum()
    assert seen.sum(1).max() <= form.width(length // BLOCK) < length // BLOCK / 2


def test_tpus_run_the_kernels_where_rows_are_whole():
    """By default, and for all programs of a step: three kernels, lowered without a TPU."""

    def kernels_in(length, sizes, **options):
        x = jax.ShapeDtypeStruct((4, length, 2, 128), jnp.bfloat16)
        loss = lambda *arrays: attention(*arrays, scale=1.0, **options).astype(float).sum()  # noqa: E731
        run = jax.grad(loss, argnums=(0, 1, 2))
        run = run if sizes is None else on_mesh(run, make_mesh(**sizes))
        with devices.compiling_for("tpu", 1 if sizes is None else 8):
            lowered = jax.jit(run).trace(x, x, x).lower(lowering_platforms=("tpu",))
        return lowered.as_text().count("tpu_custom_call")

    segments = jnp.ones((4, 600), jnp.int32)
    prefixes = {"segment_ids": segments, "prefix_ids": segments, "positions": segments}
    assert kernels_in(600, None) == 3
    assert kernels_in(600, {"data": 4, "tensor": 2}, window=9, cap=3.0) == 3
    assert kernels_in(600, None, reach=300, window=200, **prefixes) == 3
    assert kernels_in(600, {"data": 2, "sequence": 4}) == 0
    assert kernels_in(600, {"data": 8}) == 0  # four rows
    assert kernels_in(600, {"data": 2, "tensor": 4}) == 0  # two heads
    assert kernels_in(64, None) == 0
