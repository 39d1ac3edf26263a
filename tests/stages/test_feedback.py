"""Training on labelled responses as users do: sources of labels, weights, resumption, refusals."""

import json
import shutil

import pytest

from jaxalign.cli import main
from jaxalign.models import load_pretrained
from jaxalign.reporting import read_run
from jaxalign.runs.restore import run_model
from tests.commands.test_command_line import complaint

EXPERIMENT = """
from jaxalign.config import ArchitectureConfig, FeedbackConfig, OptimizerConfig, TrainConfig

def config():
    return TrainConfig(
        architecture=ArchitectureConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        max_length=64, holdout=0.2, data="pairs.jsonl",
        feedback=FeedbackConfig(
            data="labelled.jsonl", steps=4, batch_size=8, eval_every=2, save_every=2,
            optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
    )
"""
OWN = """
import jax

def hinge(responses, *, width=1.0):
    sign = 2.0 * responses.desirable - 1
    return jax.nn.relu(width - sign * responses.log_ratio)

def nothing(responses):
    return responses.log_ratio.sum()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)
    (tmp_path / "own.py").write_text(OWN)
    rows = [
        {"prompt": f"Say {n}", "completion": f"{n} it is" if n % 4 else "no", "label": n % 4 > 0}
        for n in range(40)
    ]
    write(tmp_path / "labelled.jsonl", rows)
    scores = [{"prompt": one["prompt"], "response": one["completion"]} for one in rows]
    write(
        tmp_path / "scores.jsonl",
        [one | {"score": 2 + 5 * row["label"]} for one, row in zip(scores, rows, strict=True)],
    )
    pairs = [{"prompt": f"Say {n}", "chosen": f"{n} it is", "rejected": "no"} for n in range(20)]
    write(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(*flags):
    return main(["train", "small.py", *flags])


def lines(folder, name="run"):
    return read_run(folder / "runs" / name).lines


def values(folder, name):
    """The metrics without times."""
    times = ("tokens_per_second", "mfu")
    return [{key: line[key] for key in line if key not in times} for line in lines(folder, name)]


def test_a_run_learns_its_labels_and_exports(folder, capsys):
    assert train("--feedback.steps", "20", "--feedback.save-every", "0") == 0
    out = capsys.readouterr().out
    assert "desirable and" in out
    assert "lambda_undesirable" in out  # three times as many are desirable: above 4 to 3
    assert "AUC of the rewards" in out
    held_out = [line for line in lines(folder) if line["split"] == "eval"]
    assert held_out[0]["loss"] == pytest.approx(held_out[0]["statistics/kl"] + 0.5, rel=0.5)
    assert held_out[-1]["rewards/auc"] > 0.9
    assert held_out[-1]["rewards/chosen"] > held_out[-1]["rewards/rejected"]
    run = folder / "runs" / "run"
    model, step = run_model(run, None, None)
    assert step == 20
    assert load_pretrained(run / "export").config.layers == model.config.layers == 1
    assert (run / "report" / "feedback.png").is_file()


def test_an_interrupted_run_resumes_bit_by_bit(folder):
    bco = ["--feedback.loss", "bco_unpaired", "--feedback.micro-batches", "2", "--no-export"]
    assert train("--name", "whole", *bco) == 0
    assert train("--name", "parts", *bco, "--feedback.steps", "4") == 0
    run = folder / "runs" / "parts"
    newest = max((run / "checkpoints" / "feedback").iterdir(), key=lambda path: path.name)
    assert newest.is_dir()
    shutil.rmtree(newest)
    assert train("--name", "parts", *bco) == 0
    assert values(folder, "parts") == values(folder, "whole")
    assert "statistics/mean_log_ratio" in values(folder, "whole")[-2]


def test_weights_of_prompts_are_kept_for_resuming(folder, capsys):
    flags = ["--feedback.prompt-weights", "udm", "--feedback.loss", "bco_unpaired"]
    for name in ("whole", "parts"):
        assert main(["train", "small.py", "--no-export", "--name", name, *flags]) == 0
    runs = folder / "runs"
    shutil.rmtree(runs / "parts" / "checkpoints" / "feedback" / "4")
    assert main(["train", "small.py", "--no-export", "--name", "parts", *flags]) == 0
    whole, parts = (read_run(runs / name) for name in ("whole", "parts"))
    assert whole.first_and_last("feedback", "loss") == parts.first_and_last("feedback", "loss")
    lines = (runs / "whole" / "metrics.jsonl").read_text().splitlines()
    importance = [one["importance"] for one in map(json.loads, lines) if "importance" in one]
    assert importance
    assert all(0.5 <= x <= 10 for x in importance)
    rows = [{"prompt": f"Say {n}", "completion": "no", "label": True} for n in range(20)]
    write(folder / "labelled.jsonl", rows)
    assert "compares the prompts of two" in complaint(capsys, "train", "small.py", *flags)


def test_labels_come_from_pairs_and_from_scores(folder, capsys):
    assert train("--name", "pairs", "--feedback.data", "None", "--no-export") == 0
    assert "16 desirable and 16 undesirable" in capsys.readouterr().out
    scores = ["--feedback.data", "scores.jsonl", "--no-export"]
    assert train("--name", "scores", *scores, "--feedback.threshold", "4") == 0
    assert train("--name", "labels", "--no-export") == 0
    assert values(folder, "scores") == values(folder, "labels")
    assert "label is 2, not true or false; numbers need a threshold" in complaint(
        capsys, "train", "small.py", *scores
    )


def test_adapters_and_a_loss_of_ones_own(folder):
    own = ["--feedback.loss", "own.py:hinge", "--feedback.loss-options", "width", "2"]
    assert train("--lora.rank", "2", *own) == 0
    assert lines(folder)[0]["loss"] == pytest.approx(2.0, rel=1e-4)  # policy = reference
    assert (folder / "runs" / "run" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--feedback.loss", "kto"), "feedback.loss: 'kto' is neither FILE.py:FUNCTION nor one of"),
        (("--feedback.loss-options", "tau", "1"), "feedback.loss_options: kto_unpaired has no tau"),
        (("--feedback.loss-options", "beta", "0"), "feedback.loss_options: kto_unpaired: beta"),
        (("--feedback.loss", "own.py:nothing"), "one value per"),
        (("--feedback.loss", "own.py:nobody"), "has no function nobody"),
        (("--feedback.data", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, flags, said):
    assert said in complaint(capsys, "train", "small.py", *flags)
