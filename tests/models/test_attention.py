"""Attention by blocks, row by row, over devices = attention written out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import devices
from jaxalign.models.attention import attention
from jaxalign.sharding import make_mesh, state_sharding
from jaxalign.training.step import on_mesh
from tests.slow import mostly_slow

OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "wide window": {"window": 100},
    "cap": {"cap": 1.5},
    "cap and window": {"cap": 1.5, "window": 7},
}


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def written_out(q, k, v, segments, *, scale, window=None, cap=None):
    """The textbook's formula, one query and head at a time, in NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    groups = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if segments[b][s] == segments[b][t]]
        scores = scale * k[b, seen, h // groups] @ q[b, t, h]
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, h // groups]
    return out


ALL = (7, True)  # blocks and segments at once
FORMS = [
    *((name, *ALL, one_cpu) for name in OPTIONS for one_cpu in (False, True)),
    *(("plain", 64, False, one_cpu) for one_cpu in (False, True)),
    ("cap and window", 64, True, False),
    ("window", 7, False, True),
]


@pytest.mark.parametrize(
    ("name", "block", "segmented", "one_cpu"),
    mostly_slow(itertools.product(OPTIONS, (7, 64), (False, True), (False, True)), quick=FORMS),
)
def test_attention_is_the_textbooks(name, block, segmented, one_cpu, rng, monkeypatch):
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_cpu)
    options = OPTIONS[name]
    q, k, v = draw(rng, 2, 19, 4, 8), draw(rng, 2, 19, 2, 8), draw(rng, 2, 19, 2, 8)
    segments = np.ones((2, 19), np.int32)
    if segmented:
        segments[0, 6:], segments[1, :3], segments[1, 14:] = 2, 0, 0
    ids = jnp.asarray(segments) if segmented else None
    run = jax.jit(functools.partial(attention, scale=0.4, query_block=block, **options))
    out = run(q, k, v, segment_ids=ids)
    expected = written_out(q, k, v, segments, scale=0.4, **options)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("one_cpu", [False, True], ids=["at once", "row by row"])
def test_blocks_change_no_gradient(one_cpu, rng, monkeypatch):
    arrays = draw(rng, 1, 19, 4, 8), draw(rng, 1, 19, 2, 8), draw(rng, 1, 19, 2, 8)

    def loss(arrays, block):
        return jnp.square(attention(*arrays, scale=0.4, window=6, query_block=block)).sum()

    whole = jax.grad(loss)(arrays, 64)
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_cpu)
    blocked = jax.grad(loss)(arrays, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), blocked, whole)


def test_blocked_attention_never_holds_all_scores():
    """Compiled temporaries of the gradient stay below one [heads, length, length] array."""
    length, heads = 2048, 4
    x = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, scale=1.0, query_block=128).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * heads * length * length * 4


@pytest.mark.parametrize("name", mostly_slow(OPTIONS, quick=["plain", "cap and window"]))
def test_positions_split_over_devices_change_nothing(name, rng):
    options = OPTIONS[name]
    q, k, v = draw(rng, 2, 16, 4, 8), draw(rng, 2, 16, 2, 8), draw(rng, 2, 16, 2, 8)
    mesh = make_mesh(data=2, sequence=4)
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], 8, axis=1))

    def run(q, k, v):
        out = attention(q, k, v, scale=0.4, segment_ids=segments, query_block=8, **options)
        return out, jax.grad(lambda q: jnp.square(attention(q, k, v, scale=0.4)).sum())(q)

    alone = jax.jit(run)(q, k, v)
    arrays = jax.device_put((q, k, v), state_sharding(mesh))
    split = jax.jit(on_mesh(run, mesh))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), split, alone)
    assert split[0].sharding.is_equivalent_to(state_sharding(mesh), 4)


def packed_pairs(rng, length, number, longest):
    """Segments, prefixes and positions of pairs one after the other, then padding; the reach."""
    segments, prefixes, positions, reach = [], [], [], 0
    for pair in range(number):
        common, first, second = rng.integers([1, 0, 1], longest + 1)
        parts = [1] * common + [2] * first + [3] * second
        segments += [3 * pair + part for part in parts]
        prefixes += [3 * pair + 1] * len(parts)
        positions += [*range(common + first), *range(common, common + second)]
        reach = max(reach, len(parts))
    assert len(segments) < length
    rows = np.zeros((3, length), np.int32)
    rows[:, : len(segments)] = segments, prefixes, positions
    return rows, reach


@pytest.mark.parametrize(
    ("name", "one_cpu"),
    mostly_slow(
        itertools.product(OPTIONS, (False, True)),
        quick=[("plain", True), ("window", False), ("cap", False), ("cap and window", True)],
    ),
)
def test_packed_rows_read_no_more_keys_than_they_reach(name, one_cpu, rng, monkeypatch):
    """Against the same attention with all keys, in numbers and gradients."""
    options = OPTIONS[name]
    monkeypatch.setattr("jaxalign.models.attention.PACKED_BLOCK", 4)
    arrays = draw(rng, 2, 67, 4, 8), draw(rng, 2, 67, 2, 8), draw(rng, 2, 67, 2, 8)
    rows = [packed_pairs(rng, 67, 4, 6), packed_pairs(rng, 67, 6, 4)]
    names = "segment_ids", "prefix_ids", "positions"
    layout = dict(zip(names, jnp.asarray(np.stack([x for x, _ in rows], 1)), strict=True))
    weights = (
        jnp.asarray(rng.normal(size=arrays[0].shape)) * (layout["segment_ids"] > 0)[..., None, None]
    )

    def run(arrays, reach):
        out = attention(*arrays, scale=0.4, query_block=8, reach=reach, **layout, **options)
        return jnp.sum(out * weights), jnp.where(weights != 0, out, 0)

    expected = jax.grad(run, has_aux=True)(arrays, None)
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one_cpu)
    reach = max(reach for _, reach in rows)
    banded = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)(arrays, reach)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), banded, expected)
