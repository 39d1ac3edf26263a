"""`jaxalign plan`: pages, sweeps and figures, for simulated devices and for the TPU compiler."""

import json
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.planning import topologies
from jaxalign.planning.topologies import Chip

EXPERIMENT = """
from jaxalign.config import ArchitectureConfig, PreferenceConfig, TrainConfig

def config(scale):
    return TrainConfig(
        name="small",
        architecture=ArchitectureConfig(
            width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, context=64
        ),
        max_length=16,
        preference=PreferenceConfig(steps=1, batch_size=4 if scale == "tiny" else 8),
    )
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)


def plan(*flags):
    return main(["plan", "small.py", *flags])


def figures(name):
    return json.loads(Path(name).read_text())


def test_a_page_for_a_slice(experiment, capsys):
    adapters = ["--lora.rank", "2", "--mesh.fsdp", "4", "--response", "8"]
    assert plan("--topology", "cpu:4", *adapters, "--json", "plan.json") == 0
    text = capsys.readouterr().out
    assert "small, preference: dpo on a model with random weights, adapters of rank 2" in text
    assert "cpu:4, 4 chips: data 1, fsdp 4, sequence 1, tensor 1" in text
    assert "a batch of 8 pairs of 2 x 16 tokens" in text  # `paper` unless told
    (one,) = figures("plan.json")
    lasting = one["lasting"]  # adapters alone are trained: two moments each, and counters
    assert lasting["optimizer"] == pytest.approx(2 * lasting["parameters"], abs=16)
    kinds = {"all-gather of weights", "all-reduce of gradients"}
    assert one["work"]["links"].keys() == kinds
    for kind, size in one["work"]["links"].items():
        assert f"{size / 2**20:12,.3f} {kind}" in text
    total = sum(lasting.values()) + sum(one["step"].values())
    assert f"total                                {total / 2**20:9.3f}" in text
    assert one["capacity"] is None


def test_all_stages_are_planned_or_one(experiment, capsys):
    sft = ["--sft.epochs", "1", "--sft.batch-size", "8"]  # its data need not be known
    assert plan("--topology", "cpu:2", *sft, "--json", "plans.json") == 0
    assert [one["stage"] for one in figures("plans.json")] == ["sft", "preference"]
    assert "next tokens of responses on a model with random weights" in capsys.readouterr().out
    assert plan("--topology", "cpu:2", *sft, "--stage", "sft", "--json", "plan.json") == 0
    assert [one["stage"] for one in figures("plan.json")] == ["sft"]


def test_what_does_not_fit_is_mended(experiment, capsys, monkeypatch):
    chip = Chip(memory=100_000, flops=1e9, bandwidth=1e9, link=1e9)
    monkeypatch.setitem(topologies.CHIPS, "cpu", chip)
    flags = ["--topology", "cpu:4", "--remat", "full", "--preference.batch-size", "4"]
    assert plan(*flags) == 1
    text = capsys.readouterr().out
    assert "of 0.10: does not fit" in text
    first, *_, last = text[text.index("one change after the other") :].strip().splitlines()[1:]
    assert first.startswith("  --mesh.data 1 --mesh.fsdp 4: ")
    assert "or more of these hold what stays between steps" in last or last.endswith(": fits")


def test_a_sweep_ranks_what_fits(experiment, capsys):
    flags = ["--scale", "tiny", "--topology", "cpu:2", "--sweep", "--most", "2"]
    assert plan(*flags, "--json", "plans.json") == 0
    plans = figures("plans.json")
    assert len(plans) == 2
    text = capsys.readouterr().out
    tried, ranked = text.strip().split("\n\nhighest bound of those that fit:\n")
    assert tried == ranked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:2x2"], "topology: 'v9:2x2' is not KIND:SHAPE"),
        (["--topology", "cpu:64"], "set JAX_NUM_CPU_DEVICES=64"),
        (["--topology", "cpu:8", "--preference.batch-size", "6"], "not a multiple of data x fsdp"),
        (["--topology", "cpu:2", "--preference.steps", "0"], "small: has no stage to plan"),
        (["--topology", "cpu:2", "--stage", "sft"], "--stage: small runs no 'sft'; it runs pref"),
        (
            ["--topology", "cpu:2", "--sft.steps", "1", "--sweep"],
            "--sweep: is of one stage; add --stage sft or --stage preference",
        ),
        (["--topology", "cpu:2", "--model", "gone"], "a plan only needs its config.json"),
    ],
    ids=["kind", "devices", "rows", "stage", "other stage", "stages", "model"],
)
def test_what_cannot_be_planned_is_named(experiment, capsys, flags, message):
    assert plan(*flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_tpu_compiler_finds_room_or_says_what_makes_some(experiment, capsys, optimised):
    pytest.importorskip("libtpu")
    flags = ["--topology", "v5e:2x2", "--dtype", "bfloat16"]
    assert plan(*flags, "--mesh.fsdp", "4") == 0
    assert "of 16,128.00: fits" in capsys.readouterr().out
    large = ["--architecture.width", "2048", "--architecture.layers", "8", "--max-length", "2048"]
    large += ["--architecture.mlp-width", "8192", "--architecture.context", "2048"]
    assert plan(*flags, *large, "--preference.batch-size", "32") == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "--remat full" in text
