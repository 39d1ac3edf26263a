"""Every test: eight CPU devices, no silent rank promotion, random numbers of its own.

Programs are compiled with few optimisations, which is what a suite of small programs spends its
time on; the fixture `optimised` gives a test what users run.
"""

import math
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Simulated devices wait for each other; XLA ends the process where a busy machine lets them wait
# for longer than 40 seconds.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# Compiling is most of what the suite does. XLA's older code for fusions, which later versions have
# no more, compiles three times faster.
OLDER = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE} {OLDER}".strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs are not kept from one file to the next: they take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def progress_by_the_clock(monkeypatch):
    """A slow machine writes no line more than a fast one; test_progress.py overrides this."""
    monkeypatch.setattr("jaxalign.progress.SLOW", math.inf)
    monkeypatch.setattr("jaxalign.progress.EVERY", math.inf)


@pytest.fixture
def optimised():
    """Programs compiled as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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


@pytest.fixture
def real_weights():
    """The folder of larger real models (docs/guides/models.md); skips where none is set."""
    folder = os.environ.get("JAXALIGN_REAL_WEIGHTS")
    if folder is None:
        pytest.skip("JAXALIGN_REAL_WEIGHTS does not name a folder of GGUF files")
    return Path(folder)
