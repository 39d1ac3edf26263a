"""What a step keeps, what is free, and what is chosen, with numbers given."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxalign.losses import dpo
from jaxalign.models import DecoderConfig, decoder
from jaxalign.training.memory import choose, free_memory, in_words, saved_bytes
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from tests.entanglement.test_probing import pairs_for

SIZES = {"none": 100.0, "dots": 50.0, "full": 10.0}


@pytest.mark.parametrize(
    ("other", "free", "choice"),
    [
        (60, 200, "none"),
        (61, 200, "dots"),
        (111, 200, "full"),
        (500, 200, "full"),
        (9, None, "none"),
    ],
)
def test_the_fastest_that_fits_four_fifths_of_what_is_free(other, free, choice):
    assert choose(SIZES.__getitem__, other, free, platform="tpu") == (choice, SIZES[choice])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("free", "choice"), [(200, "dots"), (None, "dots"), (70, "full")])
def test_all_but_products_are_recomputed_where_that_is_faster_than_reading(free, choice, platform):
    assert choose(SIZES.__getitem__, 20, free, platform=platform) == (choice, SIZES[choice])


def test_no_more_is_traced_than_is_needed():
    asked = []

    def size(choice):
        asked.append(choice)
        return SIZES[choice]

    choose(size, 0, 1000, platform="tpu")
    assert asked == ["none"]


def machine(root, available=None, **files):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    if available is not None:
        text = f"MemTotal: 99999 kB\nMemAvailable:   {available} kB\n"
        (root / "proc/meminfo").write_text(text)
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPU = types.SimpleNamespace(platform="cpu")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def test_a_cpu_has_what_is_available(tmp_path):
    assert free_memory(CPU, machine(tmp_path, 1000)) == 1000 * 1024
    assert free_memory(CPU, tmp_path / "not linux") is None


def test_devices_of_one_cpu_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert free_memory(CPU, machine(tmp_path, 1000)) == 250 * 1024


@pytest.mark.parametrize(
    ("group", "base", "limit", "used"),
    [
        ("0::/job/step", "sys/fs/cgroup/job", "memory.max", "memory.current"),
        (
            "4:memory:/job/step",
            "sys/fs/cgroup/memory/job",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
)
def test_the_limit_of_a_group_above_binds(tmp_path, group, base, limit, used):
    root = machine(tmp_path, 1000)
    (root / "proc/self/cgroup").write_text(group + "\n")
    job = root / base
    (job / "step").mkdir(parents=True)
    (job / "step" / limit).write_text("max\n")
    (job / "step" / used).write_text("5\n")
    (job / limit).write_text("500000\n")
    (job / used).write_text("300000\n")
    (job / "memory.stat").write_text("active_file 7\ninactive_file 50000\n")
    assert free_memory(CPU, root) == 250000
    (job / limit).write_text("9223372036854771712\n")  # version 1's "none"
    assert free_memory(CPU, root) == 1000 * 1024


def test_an_accelerator_says_its_limit_or_nothing():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert free_memory(device) == 70
    silent = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert free_memory(silent) is None


def test_sizes_in_words():
    assert [in_words(x) for x in (1.3 * 2**30, 18 * 2**30, 3.5 * 2**20, 9)] == [
        "1.3 GiB",
        "18 GiB",
        "3.5 MiB",
        "under 1 MiB",
    ]


def test_what_is_kept_is_what_the_compiler_reserves():
    """Within a quarter, of a batch whose activations are much more than its parameters."""
    config = DecoderConfig(
        vocab_size=64,
        width=32,
        layers=4,
        heads=4,
        kv_heads=4,
        head_width=8,
        mlp_width=96,
        context_length=128,
        tied=True,
    )
    params = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    pairs = pairs_for(64, pairs=16, prompt=64, response=64)
    batch = jax.eval_shape(lambda: ReferencedBatch(pairs=pairs, reference=jnp.zeros((16, 2))))
    frozen = {"policy": None, "reference": None}
    found, reserved = {}, {}
    for remat in ("none", "full"):
        policy = Policy(config=config, remat=remat)
        objective: Any = PreferenceObjective(policy=policy, loss=dpo, options={"beta": 0.1})
        found[remat] = saved_bytes(objective, params, frozen, batch)

        def step(params, batch, objective=objective):
            def loss(params):
                outputs = objective.forward(params, frozen, batch, None)
                return objective.reduce(outputs, batch, objective.count(batch))[0]

            return jax.grad(loss)(params)

        used: Any = jax.jit(step).lower(params, batch).compile().memory_analysis()
        reserved[remat] = used.temp_size_in_bytes
    assert found["none"] == pytest.approx(reserved["none"], rel=0.25)
    assert found["full"] + (found["none"] - found["full"]) / 4 == pytest.approx(
        reserved["full"], rel=0.35
    )
    halves = saved_bytes(objective, params, frozen, batch, micro_batches=2)
    assert halves == pytest.approx(found["full"] / 2, rel=0.01)
