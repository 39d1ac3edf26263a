"""Heads that may attend to nothing: every form of attention = softmax with one more column."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import devices
from jaxalign.models.attention import attention
from jaxalign.models.sequences import sequences_of
from jaxalign.sharding import head_sharding, make_mesh
from jaxalign.training.step import on_mesh
from tests.models.test_attention import draw, packed_pairs
from tests.models.test_flash import seen_in
from tests.slow import mostly_slow

LENGTH = 37
FORMS = {
    "at once": {"implementation": "blocked"},
    "in blocks": {"implementation": "blocked", "query_block": 8},
    "row by row": {"implementation": "blocked", "query_block": 8},
    "flash": {"implementation": "flash", "query_block": 16},
    "cudnn": {"implementation": "cudnn"},
}


def dense(q, k, v, sinks, seen):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = 0.4 * jnp.einsum("bqhd,bshd->bhqs", q, k, precision="highest")
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    column = jnp.moveaxis(sinks, 2, 1)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhqs,bshd->bqhd", weights, v, precision="highest")


def arrays_of(rng):
    sizes = ((4, 8), (2, 8), (2, 8), (4,))
    return tuple(draw(rng, 2, LENGTH, *size) for size in sizes)


def layouts(kind, rng):
    """Arguments of `attention`, and segments, prefixes and positions."""
    ones = np.ones((2, LENGTH), np.int32)
    if kind == "plain":
        return {}, (ones, ones, ones.cumsum(1))
    pairs = [packed_pairs(rng, LENGTH, 3, 3) for _ in range(2)]
    rows = np.stack([x for x, _ in pairs], 1)
    names = "segment_ids", "prefix_ids", "positions"
    found = dict(zip(names, jnp.asarray(rows), strict=True))
    found["reach"] = max(reach for _, reach in pairs)
    if kind == "sequences":
        found["sequences"] = sequences_of(found["segment_ids"], 3, 2, 8)
    return found, rows


def fused(q, k, v, *, scale, window, seen=None):
    """In place of cuDNN's kernel, with its own arguments."""
    assert q.shape[1] % 2 == 0
    local = None if window is None else (window - 1, 0)
    form = {"scale": scale, "is_causal": True, "local_window_size": local}
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="xla", **form)


QUICK = [
    ("at once", "packed", None),
    ("in blocks", "plain", 4),
    ("row by row", "plain", 4),
    ("row by row", "packed", None),
    ("flash", "packed", 4),
    ("cudnn", "plain", None),
    ("cudnn", "plain", 4),
    ("cudnn", "packed", None),
    ("cudnn", "sequences", 4),
]
EVERY = [
    *itertools.product(FORMS, ["plain", "packed"], [None, 4]),
    ("cudnn", "sequences", None),
    ("cudnn", "sequences", 4),
]


@pytest.mark.parametrize(("form", "kind", "window"), mostly_slow(EVERY, quick=QUICK))
def test_numbers_and_gradients_are_those_of_one_more_column(form, kind, window, rng, monkeypatch):
    monkeypatch.setattr("jaxalign.models.attention.PACKED_BLOCK", 8)
    monkeypatch.setattr("jaxalign.models.attention._cudnn", fused)
    monkeypatch.setattr(devices, "is_single_cpu", lambda: form == "row by row")
    arrays, (layout, rows) = arrays_of(rng), layouts(kind, rng)
    real = jnp.asarray(rows[0] > 0)[..., None, None]
    weights = draw(rng, *arrays[0].shape) * real

    def weighed(run, *arrays):
        out = run(*arrays) * real
        return jnp.sum(out * weights), out

    def ours(q, k, v, sinks):
        options = {"scale": 0.4, "window": window, "sinks": sinks}
        return attention(q, k, v, **options, **layout, **FORMS[form])

    wanted = functools.partial(dense, seen=seen_in(*rows, window=window))
    found, expected = (
        jax.jit(jax.grad(functools.partial(weighed, run), argnums=(0, 1, 2, 3), has_aux=True))(
            *arrays
        )
        for run in (ours, wanted)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, expected)
    assert np.abs(expected[0][3]).max() > 0.01


def test_rows_and_heads_are_split_over_devices(rng):
    arrays, mesh = arrays_of(rng), make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    flash = functools.partial(attention, scale=0.4, **FORMS["flash"])

    def run(q, k, v, sinks):
        loss = lambda *x: jnp.sin(flash(*x[:3], sinks=x[3])).sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 3))(q, k, v, sinks)

    with devices.compiling_for("cpu", 1):
        alone = jax.jit(run)(*arrays)
    placed = jax.device_put(arrays[:3], head_sharding(mesh))
    split = jax.jit(on_mesh(run, mesh))(*placed, arrays[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), split, alone)


def test_gpus_use_the_fused_kernel_where_it_knows_the_sinks():
    """In 16 bits, with heads of up to 120, and windows in rows that are not too long."""
    from jaxalign.models.attention import _fastest

    def chosen(length, width, dtype=jnp.bfloat16, plain=True):
        found = []

        def run(q, sinks):
            found.append(_fastest(q, q, plain=plain, cap=None, sinks=sinks))

        with devices.compiling_for("gpu", 1):
            shapes = (1, length, 4, width), (1, length, 4)
            jax.eval_shape(run, *map(jax.ShapeDtypeStruct, shapes, (dtype, jnp.float32)))
        return found[0]

    assert chosen(8192, 64) == chosen(4096, 64, plain=False) == "cudnn"
    assert chosen(8192, 64, plain=False) == chosen(64, 128) == "blocked"
    assert chosen(64, 64, jnp.float32) == "blocked"
