"""`jaxalign plan`: a page, a sweep and figures, for simulated devices and for the TPU compiler."""

import json
from pathlib import Path

import pytest

from jaxalign.cli import main

EXPERIMENT = """
from jaxalign.config import ArchitectureConfig, StageConfig, TrainConfig

def config(scale):
    return TrainConfig(
        name="small",
        architecture=ArchitectureConfig(
            width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, context=64, vocabulary=64
        ),
        max_length=16,
        preference=StageConfig(steps=1, batch_size=4 if scale == "tiny" else 8),
    )
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)


def test_a_page_for_a_slice(experiment, capsys):
    adapters = ["--lora.rank", "2", "--mesh.fsdp", "4", "--response", "8"]
    assert main(["plan", "small.py", "--topology", "cpu:4", *adapters, "--json", "plan.json"]) == 0
    text = capsys.readouterr().out
    assert "cpu:4, 4 chips: data 1, fsdp 4, sequence 1, tensor 1" in text
    assert "a batch of 8 pairs of 2 x 16 tokens" in text  # `paper` unless told
    (plan,) = json.loads(Path("plan.json").read_text())
    memory = plan["memory"]  # adapters alone are trained: two moments each, and counters
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], abs=16)
    assert plan["work"]["link_bytes"] > 0
    assert plan["capacity"] is None


def test_a_sweep_ranks_what_fits(experiment, capsys):
    flags = ["--scale", "tiny", "--topology", "cpu:2", "--sweep", "--json", "plans.json"]
    assert main(["plan", "small.py", *flags]) == 0
    plans = json.loads(Path("plans.json").read_text())
    meshes = {tuple(plan["mesh"].values()) for plan in plans}
    assert meshes == {(1, 2, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2)}
    assert {plan["remat"] for plan in plans} == {"none", "dots", "full"}
    assert "fastest bound of those that fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:2x2"], "topology: 'v9:2x2' is not KIND:SHAPE"),
        (["--topology", "cpu:64"], "set JAX_NUM_CPU_DEVICES=64"),
        (["--topology", "cpu:8", "--preference.batch-size", "6"], "not a multiple of data x fsdp"),
        (
            ["--topology", "cpu:2", "--preference.steps", "0"],
            "neither a preference nor an online",
        ),
    ],
    ids=["kind", "devices", "rows", "stage"],
)
def test_what_cannot_be_planned_is_named(experiment, capsys, flags, message):
    assert main(["plan", "small.py", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_tpu_compiler_finds_room_or_says_how_much_is_missing(experiment, capsys):
    pytest.importorskip("libtpu")
    flags = ["--topology", "v5e:2x2", "--mesh.fsdp", "4", "--dtype", "bfloat16"]
    assert main(["plan", "small.py", *flags]) == 0
    assert "of 16: fits" in capsys.readouterr().out
    large = ["--architecture.width", "4096", "--architecture.layers", "8"]
    large += ["--architecture.mlp-width", "16384", "--architecture.vocabulary", "128000"]
    assert main(["plan", "small.py", *flags, *large]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "--remat full" in text
