"""Work against its formulas, counted by hand, and against the collectives of a compiled step."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.models import EncoderDecoderConfig, encoder_decoder
from jaxalign.models.decoder import init_params
from jaxalign.models.score import init_head, with_head
from jaxalign.planning.cost_model import Work, bound, work
from jaxalign.sharding import make_mesh, parameter_shardings
from jaxalign.training.objectives import Policy, ReferencedBatch
from jaxalign.training.stage import Rows
from jaxalign.training.step import compile_step, initial_state, train_step
from jaxalign.training.throughput import flops_per_token, matrix_parameters
from tests.training.test_step import CONFIG, LENGTH, PAIRS, RESPONSE, make_batch, objective_of

SHAPES = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
EVEN = dataclasses.replace(
    CONFIG, vocab_size=256, width=64, kv_heads=2, head_width=32, mlp_width=192
)
"""Every axis divides by four."""
ROWS, SCORED = 2 * PAIRS, RESPONSE
DPO = Rows(rows=ROWS, length=LENGTH, scored=SCORED, forward=2, backward=1)


def work_on(sizes, passes=(DPO,), params=SHAPES, model_config=CONFIG, **options):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**({"data": 1} | sizes), devices=jax.devices()[:count])
    usual = {"moments": 0, "adapters": False, "remat": "none", "dtype": jnp.float32}
    trained = options.pop("trained", params)
    return work(model_config, params, trained, passes, mesh, **(usual | options))


def test_flops_of_a_decoder():
    tokens, heads = ROWS * LENGTH, CONFIG.heads * CONFIG.head_width
    unembedding = CONFIG.vocab_size * CONFIG.width
    one = work_on({"data": 1})
    assert one.tokens == tokens
    # as if the unembedding saw all positions, less those that it does not see
    everywhere = flops_per_token(SHAPES, live_reference=True) * tokens
    assert one.model_flops == everywhere - 8 * unembedding * ROWS * (LENGTH - SCORED)
    attention = 2 * LENGTH * heads * CONFIG.layers * tokens  # products forward
    assert one.flops == one.model_flops + 8 * attention
    assert work_on({"fsdp": 4}).flops == one.flops / 4

    again = work_on({"data": 1}, remat="full")
    assert again.flops == pytest.approx(one.flops * 10 / 8)  # a forward pass more
    assert again.model_flops == one.model_flops
    assert work_on({"data": 1}, remat="dots").flops == one.flops + 2 * attention
    adapters = work_on({"data": 1}, adapters=True)
    assert adapters.model_flops == one.model_flops * 6 / 8
    half = Rows(rows=ROWS, length=LENGTH, scored=0, forward=1, depth=0.5)
    kernels = matrix_parameters(SHAPES) - unembedding
    assert work_on({"data": 1}, [half]).model_flops == 2 * 0.5 * kernels * tokens
    assert work_on({"data": 1}, [DPO, half]).tokens == tokens  # those that are learned from


def test_attention_of_a_packed_row_is_as_long_as_an_example():
    packed = Rows(rows=1, length=4 * LENGTH, scored=4 * SCORED, forward=2, backward=1)
    apart = Rows(rows=4, length=LENGTH, scored=SCORED, forward=2, backward=1)
    assert work_on({"data": 1}, [packed]).flops > work_on({"data": 1}, [apart]).flops
    packed = dataclasses.replace(packed, reach=LENGTH)
    assert work_on({"data": 1}, [packed]) == work_on({"data": 1}, [apart])


def test_flops_of_an_encoder_decoder():
    config = EncoderDecoderConfig(
        vocab_size=64, width=16, layers=2, decoder_layers=3, heads=2, head_width=8, mlp_width=32
    )
    params = jax.eval_shape(lambda: encoder_decoder.init_params(config, jax.random.key(0)))
    passes = [Rows(rows=4, length=LENGTH, scored=SCORED, forward=1)]
    done = work_on({"data": 1}, passes, params, config)
    square, mlp = 16 * 16, 3 * 16 * 32
    encoder = 2 * LENGTH * (4 * square + mlp)
    decoder = 3 * (SCORED * (4 * square + mlp) + square * (2 * SCORED + 2 * LENGTH))
    assert done.model_flops == 2 * 4 * (encoder + decoder + SCORED * 16 * 64)
    attention = 2 * 16 * (2 * LENGTH**2 + 3 * (SCORED**2 + SCORED * LENGTH))
    assert done.flops - done.model_flops == 2 * 4 * attention
    scored = with_head(params, jax.eval_shape(lambda: init_head(16, jax.random.key(0))))
    with_score = work_on({"data": 1}, passes, scored, config)
    assert with_score.model_flops == done.model_flops - 2 * 4 * (SCORED * 16 * 64 - 16)


def test_bytes_over_links_by_kind():
    assert work_on({"data": 1}).links == {}
    matrices, size = matrix_parameters(SHAPES), 4 * sum(x.size for x in jax.tree.leaves(SHAPES))
    table = 4 * CONFIG.vocab_size * CONFIG.width
    four = work_on({"fsdp": 4}).links
    # three quarters of the weights come in for forward, backward and reference, of the embedding
    # for the two passes forward; of the gradients three quarters once
    assert four == {
        "all-gather of weights": pytest.approx(0.75 * (3 * 4 * matrices + 2 * table)),
        "reduce-scatter of gradients": pytest.approx(0.75 * size),
    }
    parts = work_on({"fsdp": 4}, micro_batches=2).links
    assert parts == {kind: pytest.approx(2 * amount) for kind, amount in four.items()}
    half = work_on({"fsdp": 4}, dtype=jnp.bfloat16).links
    assert half == {kind: pytest.approx(amount / 2) for kind, amount in four.items()}
    copies = work_on({"data": 4})
    assert copies.links == {"all-reduce of gradients": pytest.approx(2 * 0.75 * size)}
    assert copies.link_bytes == pytest.approx(1.5 * size)
    adapters = work_on({"data": 2, "fsdp": 2}, adapters=True, trained={"a": SHAPES["embed"]})
    assert adapters.links["all-reduce of gradients"] == pytest.approx(2 * 0.75 * table)
    assert "reduce-scatter of gradients" not in adapters.links

    # two copies on each of two slices: summed over links first, then over the network
    slices = work_on({"data": 4, "fsdp": 2}, slices=2)
    assert slices.links["all-reduce of gradients"] == pytest.approx(2 * 0.5 * size / 2)
    assert slices.network == pytest.approx(2 * 0.5 * size / 2 / 2)
    assert copies.network == 0

    states = 4 * ROWS * LENGTH * CONFIG.width  # all rows, float32
    split = work_on({"tensor": 2}).links
    sums = 2 * CONFIG.layers * 3  # after attention and MLP, in three passes
    assert split == {"all-reduce of states": pytest.approx(2 * 0.5 * states * sums)}
    keys = 2 * 4 * ROWS * LENGTH * CONFIG.kv_heads * CONFIG.head_width * CONFIG.layers
    rows = work_on({"sequence": 2}).links
    assert rows["all-gather of keys and values"] == pytest.approx(0.5 * keys * 3)


def test_memory_traffic_and_bounds():
    size = 4 * sum(x.size for x in jax.tree.leaves(SHAPES))
    plain = work_on({"fsdp": 4})
    adamw = work_on({"fsdp": 4}, moments=2 * size)
    assert adamw.memory_bytes - plain.memory_bytes == pytest.approx(4 * size / 4)  # read, written
    twice = work_on({"fsdp": 4}, micro_batches=2)
    read = 3 * 4 * matrix_parameters(SHAPES)
    assert twice.memory_bytes - plain.memory_bytes == pytest.approx(read)  # weights once more
    done = Work(tokens=1, model_flops=1.0, flops=6.0, memory_bytes=8.0, links={"a": 1.0, "b": 2.0})
    rates = {"compute": 2.0, "memory": 4.0, "links": 1.0}
    assert bound(done, rates) == {"compute": 3.0, "memory": 2.0, "links": 3.0}
    assert bound(done, {"compute": None, "memory": None, "links": None}) == {}
    apart = dataclasses.replace(done, network=8.0)
    assert bound(apart, {"network": 2.0}) == {"network": 4.0}


def received(text):
    """Bytes of the results of every kind of collective in a compiled program, loops unrolled."""
    rooms = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))
    found = {"all-gather": 0, "all-reduce": 0}

    def walk(room, times):
        for line in rooms[room].splitlines():
            if made := re.search(r" = (.*?) (all-gather|all-reduce)\(", line):
                shapes = re.findall(r"f32\[([\d,]*)\]", made[1])
                sizes = [math.prod(int(x) for x in shape.split(",") if x) for shape in shapes]
                found[made[2]] += 4 * times * sum(sizes)
            if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                walk(body[1], times * int(trips[1]))
            for called in re.findall(r" call\(.*to_apply=%?([\w.\-]+)", line):
                walk(called, times)

    walk(re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1], 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 4}, {"tensor": 2}])
def test_collectives_are_those_of_a_compiled_step(rng, optimised, sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh, optimizer = make_mesh(**({"data": 1} | sizes), devices=devices), optax.sgd(1.0)
    params = init_params(EVEN, jax.random.key(0))
    state = initial_state(params, optimizer, seed=0)
    objective = dataclasses.replace(objective_of("dpo"), policy=Policy(config=EVEN))
    step = functools.partial(train_step, objective=objective, optimizer=optimizer)
    batch = ReferencedBatch(pairs=make_batch(rng), reference=None)
    placed = jax.tree.map(jax.device_put, params, parameter_shardings(params, mesh))
    frozen = {"policy": None, "reference": placed}
    program = compile_step(step, state, mesh).lower(state, frozen, batch).compile()
    found = received(program.as_text())
    expected = work_on(sizes, params=jax.eval_shape(lambda: params), model_config=EVEN).links
    # every kind as a multiple of what the formula says of the results' bytes
    if "fsdp" in sizes:
        assert 1 <= 0.75 * found["all-gather"] / expected["all-gather of weights"] < 1.1
        reduced = expected["reduce-scatter of gradients"] / 0.75  # as all-reduce on a CPU
        assert 1 <= found["all-reduce"] / reduced < 1.1
    elif "data" in sizes:
        assert found["all-gather"] == 0
        assert 1 <= 1.5 * found["all-reduce"] / expected["all-reduce of gradients"] < 1.1
    else:  # this compiler sums the states of queries, keys and values apart
        assert 1 <= found["all-reduce"] / expected["all-reduce of states"] < 2
