"""Plans: the compiler's memory against what arrays take, work against its formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.models.decoder import init_params
from jaxalign.sharding import batch_sharding, make_mesh, place
from jaxalign.training.planning import TooLargeError, compiled_memory, pair_structs, work
from jaxalign.training.step import compile_step, initial_state, train_step
from jaxalign.training.throughput import flops_per_token
from tests.training.test_step import CONFIG, LENGTH, PAIRS, RESPONSE, make_batch, objective_of

SHAPES = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
BATCH = pair_structs(PAIRS, LENGTH, RESPONSE, reference=False)


def test_a_plan_is_the_memory_of_the_step_itself(rng):
    mesh, optimizer = make_mesh(data=2, fsdp=2, tensor=2), optax.adamw(1e-3)
    params = init_params(CONFIG, jax.random.key(1))
    state = place(initial_state(params, optimizer, seed=0), mesh)
    reference = place(params, mesh)
    pairs = jax.device_put(make_batch(rng), batch_sharding(mesh))
    frozen, batch = {"policy": None, "reference": reference}, _referenced(pairs)
    objective = objective_of("dpo")
    step = partial(train_step, objective=objective, optimizer=optimizer)
    real = compile_step(step, state, mesh).lower(state, frozen, batch).compile().memory_analysis()

    shapes = {"policy": None, "reference": SHAPES}
    planned = compiled_memory(objective, optimizer, SHAPES, shapes, BATCH, mesh)
    assert planned.temporaries == real.temp_size_in_bytes

    def on_first(tree):
        arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "addressable_shards")]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    assert planned.parameters == on_first(state.params)
    assert planned.optimizer == on_first(state.opt_state)
    assert planned.frozen == on_first(reference)
    assert planned.batch == on_first(pairs)
    lasting = planned.parameters + planned.optimizer + planned.frozen + planned.batch
    assert lasting == pytest.approx(real.argument_size_in_bytes, rel=0.05)  # key and counters


def _referenced(pairs):
    from jaxalign.training.objectives import ReferencedBatch

    return ReferencedBatch(pairs=pairs, reference=None)


def work_on(sizes, **options):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**({"data": 1} | sizes), devices=jax.devices()[:count])
    usual = {
        "moments": 0,
        "live_reference": True,
        "adapters": False,
        "remat": "none",
        "dtype": jnp.float32,
    }
    return work(CONFIG, SHAPES, SHAPES, BATCH, mesh, **(usual | options))


def test_work_follows_its_formulas():
    tokens = 2 * PAIRS * LENGTH
    one = work_on({"data": 1})
    assert one.tokens == tokens
    assert one.link_bytes == 0
    assert one.model_flops == tokens * flops_per_token(SHAPES, live_reference=True)
    attention = 2 * LENGTH * CONFIG.heads * CONFIG.head_width * CONFIG.layers * tokens * 8
    assert one.flops == one.model_flops + attention
    again = work_on({"data": 1}, remat="full")
    assert again.flops == pytest.approx(one.flops * 10 / 8)  # a forward pass more
    assert again.model_flops == one.model_flops

    size = 4 * sum(x.size for x in jax.tree.leaves(SHAPES))
    four = work_on({"fsdp": 4})
    assert four.flops == one.flops / 4
    # three quarters of the weights come in for forward, backward and reference; of the gradients
    # three quarters once more
    assert four.link_bytes == pytest.approx(0.75 * size * 4)
    copies = work_on({"data": 4})
    assert copies.link_bytes == pytest.approx(2 * 0.75 * size)
    adamw = work_on({"fsdp": 4}, moments=2 * size)
    assert adamw.memory_bytes - four.memory_bytes == pytest.approx(4 * size / 4)  # read, written
    half = work_on({"fsdp": 4}, dtype=jnp.bfloat16)
    assert half.link_bytes == pytest.approx(0.75 * size * 2.5)


def test_what_the_compiler_says_of_its_limits_is_read():
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (29.25G) exceeds available HBM (15.75G). HLO module: x."
    )
    assert TooLargeError(text).sizes == [29.25 * 2**30, 15.75 * 2**30]
    assert TooLargeError("RESOURCE_EXHAUSTED: of something").sizes == []
