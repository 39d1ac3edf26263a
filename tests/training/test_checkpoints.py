"""Checkpoints: what was being written when something went wrong is there afterwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sharding import make_mesh
from jaxalign.training.checkpoints import Checkpoints, newest_step


def test_an_error_waits_for_what_is_being_written(tmp_path):
    state = {"kernel": jnp.arange(4_000_000.0)}  # written in the background, after `save` returns

    def interrupted():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(3, state, {"step": 3})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert newest_step(tmp_path) == 3
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(3, state, make_mesh())
    assert meta == {"step": 3}
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])
