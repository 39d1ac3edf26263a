"""The compiled decoding loop copies no weights and no caches; programs are kept between calls."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.generation import Sampling, compile_generate, generate
from jaxalign.models import DecoderConfig, cached_decoder, decoder
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.sharding import make_mesh
from tests.slow import mostly_slow

LIMIT = 23
CONFIG = DecoderConfig(
    vocab_size=512,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    mlp_width=160,
    context_length=64,
    windowed=(True, False),
    window=8,
    tied=True,
)
SMALLEST = 64 * 2 * 16  # elements of the smallest matrix, `k`
COPIES = {"copy", "transpose", "convert", "dynamic-slice", "slice", "concatenate", "reduce-window"}
INSTRUCTION = re.compile(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")


def computations(text):
    """Name -> lines of every computation of a program in XLA's text form."""
    found, name = {}, ""
    for line in text.splitlines():
        begun = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        name = begun[1] if begun else name
        found.setdefault(name, []).append(line)
    return found


def copies(text, rows, smallest):
    """Large copies in the loop that carries the sampled tokens, with what it calls."""
    parts = computations(text)
    [loop] = [x for x in text.splitlines() if " while(" in x and f"s32[{rows},{LIMIT}]" in x]
    waiting, reached = [CALLED.search(loop[loop.index("body=") :])[1]], set()
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        waiting += [called for line in parts[name] for called in CALLED.findall(line)]
    found = []
    for name in reached:
        for line in parts[name]:
            hit = INSTRUCTION.search(line)
            if hit and hit[2] in COPIES:
                size = np.prod([int(x) for x in hit[1].split(",") if x], dtype=int)
                found += [line.strip()] if size >= smallest else []
    return found


F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.mark.parametrize(
    ("rows", "dtype", "adapted"),
    mostly_slow(
        itertools.product([1, 3], [F32, BF16], [False, True]),
        quick=[(1, F32, False), (1, BF16, True), (3, F32, True), (3, BF16, False)],
    ),
)
def test_the_loop_copies_no_weights_and_no_caches(rows, dtype, adapted):
    params = decoder.init_params(CONFIG, jax.random.key(0))
    if adapted:
        adapters = init_adapters(params, jax.random.key(1), rank=2, targets=("*",))
        params = with_adapters(params, adapters, 1.0)
    sampling = Sampling(max_tokens=LIMIT, temperature=0.0)
    mesh = make_mesh(devices=jax.devices()[:1])
    program = compile_generate(CONFIG, mesh, sampling=sampling, dtype=dtype)
    prompts, length = jnp.ones((rows, 9), jnp.int32), jnp.full(rows, 9)
    arguments = [params], prompts, length, jax.random.key(0), jnp.ones(1), 0
    text = program.lower(*arguments).compile().as_text()
    # the cache of a row, [2 heads, 32 slots, 16], is half of the smallest matrix
    assert copies(text, rows, SMALLEST // 2) == []
    assert copies(text, rows, 1) != []  # the reader of the text sees small ones


def test_a_second_call_traces_nothing(monkeypatch):
    traced, prefill = [], cached_decoder.prefill

    def counted(*given, **options):
        traced.append(1)
        return prefill(*given, **options)

    monkeypatch.setattr(cached_decoder, "prefill", counted)
    params = decoder.init_params(CONFIG, jax.random.key(0))

    def tokens(seed, length):
        prompts = jnp.ones((2, length), jnp.int32)
        return generate(
            [params],
            CONFIG,
            prompts,
            jnp.array([length, 2]),
            jax.random.key(seed),
            sampling=Sampling(max_tokens=5),
        ).tokens

    first = tokens(0, 4)
    np.testing.assert_array_equal(tokens(0, 4), first)
    assert (tokens(1, 4) != first).any()
    assert len(traced) == 1
    tokens(0, 3)
    assert len(traced) == 2
