"""Meshes refuse what does not fit; rules split what divides and leave the rest whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign.errors import UserError
from jaxalign.sharding import (
    batch_sharding,
    make_mesh,
    parameter_shardings,
    place,
    shard_batch,
    with_all_axes,
)


def test_one_size_may_be_what_is_left_over():
    mesh = make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": 0}, {"data": -1, "fsdp": -1}, {"tensor": 16}]
)
def test_sizes_that_do_not_fit_are_named(sizes):
    with pytest.raises(UserError, match=r"mesh: data="):
        make_mesh(**sizes)


def params():
    return {
        "embed": {"embedding": jnp.zeros((10, 8))},
        "layers": {
            "q": {"kernel": jnp.zeros((2, 8, 4))},
            "o": {"kernel": jnp.zeros((2, 4, 8))},
            "down": {"kernel": jnp.zeros((2, 7, 8))},
            "attention_norm": {"scale": jnp.zeros((2, 8))},
        },
    }


def test_axes_follow_the_table_and_optimizer_moments_follow_their_parameters():
    mesh = make_mesh(data=1, fsdp=2, sequence=2, tensor=2)
    specs = jax.tree.map(lambda s: s.spec, parameter_shardings(params(), mesh))
    both = "fsdp", "expert", "sequence"
    assert specs["embed"]["embedding"] == P("tensor", both)
    assert specs["layers"]["q"]["kernel"] == P(None, both, "tensor")
    assert specs["layers"]["o"]["kernel"] == P(None, "tensor", both)
    assert specs["layers"]["down"]["kernel"] == P(None, None, both)  # 7 does not divide by 2
    assert specs["layers"]["attention_norm"]["scale"] == P()
    moments = optax.adamw(1e-3).init(params())
    mu = jax.tree.map(lambda s: s.spec, parameter_shardings(moments, mesh))[0].mu
    assert mu == specs


def test_a_placed_copy_outlives_the_donation_of_its_source():
    mesh = make_mesh(data=8)
    x = place({"embed": {"embedding": jnp.arange(16.0).reshape(2, 8)}}, mesh)
    y = place(x, mesh)
    jax.jit(lambda t: jax.tree.map(lambda a: a + 1, t), donate_argnums=0)(x)
    np.testing.assert_array_equal(y["embed"]["embedding"], np.arange(16.0).reshape(2, 8))


def test_copies_of_one_devices_array_share_no_buffer_with_each_other():
    mesh = make_mesh(data=8)
    own = jnp.arange(8.0)
    first, second = place({"scale": own}, mesh), place({"scale": own}, mesh)
    use = jax.jit(lambda x, y: (x + 1, y + 1), donate_argnums=0)
    moved, _ = use(first["scale"], second["scale"])
    np.testing.assert_array_equal(moved, own + 1)
    np.testing.assert_array_equal(second["scale"], own)


def test_a_batch_is_split_by_rows():
    mesh = make_mesh()
    batch = {"tokens": np.arange(24).reshape(8, 3), "weight": np.ones(8, np.float32)}
    on_mesh = shard_batch(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, batch)
    assert all(x.sharding == batch_sharding(mesh) for x in on_mesh.values())


def test_a_mesh_of_ones_own_gets_the_axes_that_it_lacks():
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    mesh = with_all_axes(jax.sharding.Mesh(devices, ("tensor", "data")))
    assert mesh.axis_names == ("data", "fsdp", "expert", "sequence", "tensor")
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 2}
    assert (mesh.devices[:, 0, 0, 0, :] == devices.T).all()
    assert with_all_axes(make_mesh(fsdp=2)).shape == make_mesh(fsdp=2).shape
    with pytest.raises(UserError, match="mesh: axis 'model' is none of data, fsdp"):
        with_all_axes(jax.sharding.Mesh(devices, ("model", "data")))
