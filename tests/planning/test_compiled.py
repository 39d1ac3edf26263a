"""Plans: the compiler's memory against what arrays take, shapes where a run places them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.models.decoder import init_params
from jaxalign.planning.compiled import TooLargeError, lasting_memory, step_memory
from jaxalign.sharding import batch_sharding, make_mesh, place
from jaxalign.sharding.structs import bytes_on_device, placed_batch, placed_parameters
from jaxalign.training.objectives import ReferencedBatch
from jaxalign.training.step import compile_step, initial_state, train_step
from tests.training.test_step import CONFIG, make_batch, objective_of


def as_structs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def test_a_plan_is_the_memory_of_the_step_itself(rng):
    mesh, optimizer = make_mesh(data=2, fsdp=2, tensor=2), optax.adamw(1e-3)
    params = init_params(CONFIG, jax.random.key(1))
    state = place(initial_state(params, optimizer, seed=0), mesh)
    frozen = {"policy": None, "reference": place(params, mesh)}
    pairs = jax.device_put(make_batch(rng), batch_sharding(mesh))
    batch = ReferencedBatch(pairs=pairs, reference=None)
    step = partial(train_step, objective=objective_of("dpo"), optimizer=optimizer)
    real = compile_step(step, state, mesh).lower(state, frozen, batch).compile().memory_analysis()

    shapes = [placed_parameters(as_structs(tree), mesh) for tree in (state, frozen)]
    shapes.append(placed_batch(as_structs(batch), mesh))
    assert step_memory(step, *shapes, mesh)["temporaries"] == real.temp_size_in_bytes

    def on_first(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    lasting = lasting_memory(*shapes)
    assert lasting == {
        "parameters": on_first(state.params),
        "optimizer": on_first(state.opt_state),
        "frozen": on_first(frozen),
        "batch": on_first(batch),
    }
    # key and counters besides
    assert sum(lasting.values()) == pytest.approx(real.argument_size_in_bytes, rel=0.05)


def test_what_lies_in_a_tree_twice_counts_once():
    mesh = make_mesh(fsdp=4, data=2)
    kernel = jax.ShapeDtypeStruct((3, 8, 16), jnp.bfloat16)
    one = {"layers": {"q": {"kernel": kernel}}}
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one)
    both = {"policy": one, "reference": one, "scale": 2.0}
    placed = placed_parameters(both, mesh)
    assert bytes_on_device(placed) == 3 * 8 * 16 * 2 // 4
    assert placed["scale"] == 2.0
    apart = placed_parameters({"policy": one, "reference": other}, mesh)
    assert bytes_on_device(apart) == 2 * bytes_on_device(placed)


def test_what_the_compiler_says_of_its_limits_is_read():
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (29.25G) exceeds available HBM (15.75G). HLO module: x."
    )
    assert TooLargeError(text).sizes == [29.25 * 2**30, 15.75 * 2**30]
    assert TooLargeError("RESOURCE_EXHAUSTED: of something").sizes == []
