"""Every test: eight CPU devices, no silent rank promotion, random numbers of its own."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng(request):
    """A NumPy generator seeded by the test's own name: independent of test order."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def shared():
    """The folder of real weights and data; the test skips where there is none."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("JAXALIGN_SHARED", root / ".." / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real weights and data at {folder} (set JAXALIGN_SHARED)")
    return folder / "data"
