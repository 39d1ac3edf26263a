"""Adapters over quantised weights as users train them: stages, resumption, exports, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.config import LoraConfig, TrainConfig, from_json, to_json
from jaxalign.errors import UserError
from jaxalign.models import load_pretrained
from jaxalign.models.lora import merge
from jaxalign.models.peft import load_adapters
from jaxalign.planning.plans import draft
from jaxalign.runs.restore import run_base, run_model
from tests.commands.test_command_line import SMALL, complaint

NF4 = ("--lora.rank", "2", "--lora.weights", "nf4")
TIMES = ("time", "seconds", "tokens_per_second", "mfu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    return tmp_path


def train(*flags):
    return main(["train", "small.py", *flags])


def values(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in TIMES} for line in lines]


def test_a_run_resumes_bit_by_bit_and_exports_onto_the_loaded_weights(folder, capfd):
    flags = [*NF4, "--sft.steps", "0", "--preference.steps", "2", "--preference.save-every", "1"]
    check_resumed(folder, [*flags, "--max-eval-records", "0"], capfd)


@pytest.mark.slow
def test_two_stages_on_a_mesh_in_micro_batches_with_probes_do_too(folder, capfd):
    """The second stage starts from the merged model."""
    flags = [*NF4, "--mesh.fsdp", "2", "--mesh.tensor", "2", "--preference.micro-batches", "2"]
    flags += ["--entanglement.every", "2", "--preference.save-every", "2", "--dtype", "bfloat16"]
    lines = check_resumed(folder, flags, capfd)
    assert {line["stage"] for line in lines} == {"sft", "preference"}
    assert any("entanglement" in key for line in lines for key in line)


def check_resumed(folder, flags, capfd):
    """Train, drop the last checkpoint and resume; the metrics of the run."""
    assert train(*flags) == 0
    assert "export: adapters trained over nf4 weights are merged" in capfd.readouterr().err
    run = folder / "runs" / "small"
    whole, exported = values(run), (run / "export" / "model.safetensors").read_bytes()
    model, step = run_model(run, None, None)
    shutil.rmtree(run / "checkpoints" / "preference" / str(step))
    shutil.rmtree(run / "export")
    assert train(*flags) == 0
    assert values(run) == whole
    assert (run / "export" / "model.safetensors").read_bytes() == exported

    base = run_base(run, model.config)
    adapters, scale, _ = load_adapters(run / "adapter", model.config)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    export = load_pretrained(run / "export").params
    jax.tree.map(close, export, merge(base, adapters, scale))
    jax.tree.map(close, export, model.params)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "bradley_terry", "--sft.steps", "0", "--packing", "always"],
        ["--preference.steps", "0", "--feedback.steps", "2", "--feedback.batch-size", "8"],
        ["--lora.weights", "int8", "--reference", "precomputed", "--packing", "always"],
        ["--lora.weights", "bfloat16", "--dtype", "bfloat16", "--reference-every", "1"],
        ["--entanglement.ledger", "1", "--sft.packing", "always"],
    ],
    ids=["reward model", "feedback", "int8", "bfloat16", "ledger"],
)
def test_other_stages_train_over_quantised_weights(folder, flags):
    assert train(*NF4, *flags) == 0
    run = folder / "runs" / "small"
    assert all(np.isfinite(line["loss"]) for line in values(run) if "loss" in line)
    assert (run / "adapter").is_dir()
    assert main(["convert", str(run), "again"]) == 0
    read = [load_pretrained(path).params for path in (run / "export", Path("again"))]
    jax.tree.map(np.testing.assert_array_equal, *read)


def test_a_plan_counts_the_bytes_of_codes_and_scales(folder):
    start = TrainConfig(lora=LoraConfig(rank=2), remat="dots", max_length=32)
    shape = dataclasses.replace(start.architecture, width=64, layers=2, mlp_width=128)
    start = dataclasses.replace(start, architecture=shape)
    frozen = {}
    for weights in ("float32", "bfloat16", "int8", "nf4"):
        lora = dataclasses.replace(start.lora, weights=weights)
        config = dataclasses.replace(start, lora=lora, dtype="bfloat16")
        frozen[weights] = draft(config, "cpu:1", "preference").lasting["frozen"]
    matrices, vectors = 2 * (4 * 64 * 64 + 3 * 64 * 128), 4 * 64 * 5
    tables = (frozen["float32"] - 4 * matrices - vectors) // 4
    assert frozen["bfloat16"] == 2 * matrices + 2 * tables + vectors
    scales = 4 * matrices // 64
    assert frozen["int8"] == matrices + scales + 2 * tables + vectors
    assert frozen["nf4"] == matrices // 2 + scales + 2 * tables + vectors


def test_configs_of_earlier_runs_have_float32_weights():
    fields = json.loads(to_json(TrainConfig(lora=LoraConfig(rank=2))))
    del fields["lora"]["weights"]
    assert from_json(json.dumps(fields)).lora.weights == "float32"


def test_what_does_not_go_together_is_refused(folder, capsys):
    t5 = str(Path(__file__).resolve().parents[2] / "tpu" / "shapes" / "t5-v1_1-large")
    experts = str(Path(__file__).resolve().parents[2] / "tpu" / "shapes" / "qwen3-30b-a3b")
    lines = {
        ("train", "--lora.weights", "nf4"): "set --lora.rank, or float32",
        ("train", *NF4, "--online.steps", "1"): "not implemented for the online stage",
        ("train", *NF4, "--representation.steps", "1"): "for the representation stage",
        ("train", "--alignment.lora.weights", "int8"): "alignment.lora.weights: int8",
    }
    for (command, *flags), message in lines.items():
        assert message in complaint(capsys, command, "small.py", *flags), flags
    for model, what in ((t5, "encoder-decoders"), (experts, "mixtures of experts")):
        config = TrainConfig(model=model, lora=LoraConfig(rank=2, weights="nf4"))
        with pytest.raises(UserError, match=f"nf4 is not implemented for {what}; set float32"):
            draft(config, "cpu:1", "preference")
