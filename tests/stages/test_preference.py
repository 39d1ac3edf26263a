"""What a stage's step is made of."""

import json
import shutil

import pytest

from jaxalign.cli import main
from jaxalign.config import EntanglementConfig, PreferenceConfig, TrainConfig, with_fields
from jaxalign.models import DecoderConfig
from jaxalign.runs.restore import run_model
from jaxalign.stages.preference import KIND, keeps_reference_live
from tests.commands.test_command_line import complaint

SHAPE = DecoderConfig(
    vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8,
    context_length=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "changes", "live"),
    [
        (80, {}, True),  # 10 steps of 8: every pair once
        (79, {}, False),
        (79, {"loss": "tdpo2"}, True),
        (79, {"entanglement": EntanglementConfig(mask="differing")}, True),
        (79, {"reference": "live"}, True),
        (80, {"reference": "precomputed"}, False),
    ],
)
def test_the_reference_is_precomputed_where_pairs_come_again(pairs, changes, live):
    config = with_fields(
        TrainConfig(preference=PreferenceConfig(steps=10, batch_size=8)), **changes
    )
    objective = KIND.build(config, SHAPE).objective
    assert keeps_reference_live(config, objective, pairs) is live


EXPERIMENT = """
from jaxalign.config import ArchitectureConfig, OptimizerConfig, PreferenceConfig, TrainConfig

def config():
    return TrainConfig(
        architecture=ArchitectureConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        max_length=64, holdout=0.2, data="pairs.jsonl",
        preference=PreferenceConfig(
            steps=4, batch_size=8, eval_every=2, save_every=2,
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
    )
"""
TIMES = ("time", "seconds", "tokens_per_second", "mfu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)
    pairs = [
        {"prompt": f"Say {n}", "chosen": f"{n} it is", "rejected": "no " * (n % 3 + 1)}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return tmp_path


def train(*flags):
    return main(["train", "small.py", "--no-export", *flags])


def values(folder, name):
    text = (folder / "runs" / name / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: x for key, x in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize(
    "flags",
    [
        ["--reference-every", "1", "--reference-rate", "0.3", "--tail-weight", "0.5"],
        ["--reference-every", "2", "--lora.rank", "2", "--divergence", "forward_kl"],
        ["--loss", "dpo:0.8", "bco:0.2", "sft:1", "--preference.micro-batches", "2",
         "--pair-weights", "wpo", "--reference", "precomputed", "--tail-weight", "0.5"],
        ["--loss", "bco", "--calibration", "head", "--logits-sam", "0.05",
         "--preference.micro-batches", "2"],
    ],
    ids=["average", "adapters", "sum", "gradients"],
)  # fmt: skip
def test_an_interrupted_run_resumes_bit_by_bit(folder, flags):
    assert train("--name", "whole", *flags) == 0
    assert train("--name", "parts", *flags) == 0
    shutil.rmtree(folder / "runs" / "parts" / "checkpoints" / "preference" / "4")
    assert train("--name", "parts", *flags) == 0
    assert values(folder, "parts") == values(folder, "whole")
    model, step = run_model(folder / "runs" / "whole", None, 4)
    assert (step, model.config.layers) == (4, 1)
    if "sft:1" in flags:
        assert "statistics/bco.mean_log_ratio" in values(folder, "whole")[-2]
    if "--calibration" in flags:
        assert values(folder, "whole")[-2]["statistics/band_steps"] == 4


def test_what_does_not_go_together_is_refused(folder, capsys):
    lines = {
        ("--reference-every", "1", "--reference", "precomputed"): "set --reference live",
        ("--reference-every", "1", "--reference", "none"): "no reference to move",
        ("--reference-every", "1", "--loss", "simpo"): "simpo reads no reference",
        ("--reference-rate", "0.5"): "the reference does not move",
        ("--reference-every", "1", "--reference-rate", "0.5", "--lora.rank", "2"): "another rank",
        ("--divergence", "alpha", "--loss", "simpo"): "simpo does not read the log-ratio",
        ("--entanglement.ledger", "1", "--tail-weight", "0.5"): "not those of weighted tokens",
        ("--divergence-alpha", "2"): "set --divergence alpha",
        ("--tail-weight", "0.5", "--loss", "tdpo1"): "tdpo1 reads no log-probs of whole responses",
        ("--pair-weights", "wpo", "--loss", "bradley_terry"): "reads no log-probs of whole",
        ("--calibration", "all", "--loss", "sft"): "sft does not read the rejected response",
        ("--calibration", "all", "--loss", "tdpo2"): "tdpo2 reads no log-probs of whole responses",
        ("--logits-sam", "0.1", "--entanglement.ledger", "1"): "set --logits-sam 0",
        ("--logits-sam", "0.1", "--entanglement.every", "1", "--dtype", "bfloat16"): "two matrices",
        (
            "--calibration",
            "all",
            "--entanglement.every",
            "1",
            "--entanglement.reweighting",
            "centred",
        ): "sets the gradients of each pair",
        ("--log-probs", "mean", "--loss", "ipo_mean"): "ipo_mean reads means over tokens itself",
    }
    for flags, message in lines.items():
        assert message in complaint(capsys, "train", "small.py", *flags), flags
