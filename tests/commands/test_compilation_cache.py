"""A second start of the same command compiles nothing: JAX's own count of hits and misses."""

import shutil
from collections import Counter

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxalign.cli import main
from tests.tiny_model import save_tiny_model

EXPERIMENT = """
from jaxalign.config import ArchitectureConfig, PreferenceConfig, TrainConfig

def config():
    return TrainConfig(
        architecture=ArchitectureConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        max_length=96, max_records=40, max_eval_records=8, export=False,
        preference=PreferenceConfig(steps=4, batch_size=8, save_every=2),
    )
"""


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A command, started as in a process of its own -> programs found and programs compiled."""
    events = Counter()
    before = {
        name: jax.config.values[name]
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    listener = lambda event, **_: events.update([event.rsplit("/", 1)[-1]])  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    monkeypatch.chdir(tmp_path)

    def start(*arguments):
        jax.clear_caches()
        events.clear()
        assert main(list(arguments)) == 0
        return events["cache_hits"], events["cache_misses"]

    yield start
    jax.monitoring.unregister_event_listener(listener)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_resumed_run(counted, tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    command = ["train", "experiment.py", "--name", "run"]
    _, compiled = counted(*command)
    assert compiled > 5
    chosen = (tmp_path / "runs/run/remat.json").read_text()
    shutil.rmtree(tmp_path / "runs/run/checkpoints/preference/4")
    counted(*command)  # restoring has programs of its own
    shutil.rmtree(tmp_path / "runs/run/checkpoints/preference/4")
    found, compiled = counted(*command)
    assert found > 5
    assert compiled == 0
    assert (tmp_path / "runs/run/remat.json").read_text() == chosen


def test_generate(counted, tmp_path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say it."}\n')
    command = ["generate", "--model", "model", "--prompts", "prompts.jsonl", "--max-tokens", "4"]
    _, compiled = counted(*command, "--output", "first.jsonl")
    assert compiled > 0
    found, compiled = counted(*command, "--output", "second.jsonl")
    assert found > 0
    assert compiled == 0
    assert (tmp_path / "first.jsonl").read_text() == (tmp_path / "second.jsonl").read_text()
