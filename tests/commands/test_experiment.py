"""What an experiment's config becomes by what was typed: lengths, files and learning rates."""

import json

import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.commands.experiment import parse
from jaxalign.config import LoraConfig, OptimizerConfig, StageConfig, SupervisedConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.modules import find_module
from jaxalign.runs.experiment import load_config
from jaxalign.runs.rates import high_rates
from jaxalign.runs.train import warn_of_rates, with_steps
from jaxalign.stages.parts import make_update_rule
from tests.commands.test_command_line import EXPERIMENTS
from tests.tiny_model import save_tiny_model

QUICKSTART, FINETUNE = "experiments/quickstart.py", "experiments/finetune.py"


def file_of(name):
    """The file or module in FILE:FUNCTION."""
    file, _, function = name.rpartition(":")
    return file or function


SCALED = [
    (name, scale)
    for name in EXPERIMENTS
    for scale in getattr(find_module(file_of(name), "experiment"), "SCALES", ("tiny", "paper"))
]


class Rows:
    """Data of so many rows."""

    def __init__(self, number):
        self.number = number

    def examples(self, seed):
        return self.number


# ------------------------------------------------------------------------ lengths


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "steps"), [(100, 2.0, 8, 25), (101, 2.0, 8, 26), (3, 0.5, 8, 1)]
)
def test_epochs_become_steps_when_the_data_is_known(rows, epochs, batch, steps):
    stage = SupervisedConfig(epochs=epochs, batch_size=batch)
    config = with_steps(TrainConfig(sft=stage), {"sft": Rows(rows)})
    assert (config.sft.steps, config.sft.epochs, config.preference.runs) == (steps, 0, False)


def test_steps_and_epochs_replace_each_other_and_both_are_refused(capsys):
    config = parse([QUICKSTART, "--preference.epochs", "2"])
    assert (config.preference.steps, config.preference.epochs) == (0, 2)
    rule = config.preference.optimizer
    assert (rule.warmup_steps, rule.warmup_fraction) == (0, 0.1)  # 8 of 80
    assert parse([FINETUNE]).preference.epochs == 1
    config = parse([FINETUNE, "--preference.steps=7"])
    assert (config.preference.steps, config.preference.epochs) == (7, 0)
    assert not parse([FINETUNE, "--preference.steps", "0"]).preference.runs
    rule = parse([FINETUNE, "--preference.optimizer.warmup-steps", "3"]).preference.optimizer
    assert (rule.warmup_steps, rule.warmup_fraction) == (3, 0)
    flags = ["--preference.epochs", "2", "--preference.steps", "3"]
    for experiment in (QUICKSTART, FINETUNE):
        assert main(["train", experiment, *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "preference.epochs: 2, and preference.steps is 3; set one of them" in line
    with pytest.raises(UserError, match=r"sft\.optimizer\.warmup_fraction: 0\.5, and sft\.opt"):
        TrainConfig(
            sft=SupervisedConfig(optimizer=OptimizerConfig(warmup_steps=1, warmup_fraction=0.5))
        )


@pytest.mark.parametrize(("steps", "fraction", "warmup"), [(30, 0.1, 3), (31, 0.1, 4), (4, 0.0, 0)])
def test_a_warm_up_may_be_a_share_of_the_steps(steps, fraction, warmup):
    share, number = (
        make_update_rule(StageConfig(steps=steps, optimizer=OptimizerConfig(**how)))[1]
        for how in ({"warmup_fraction": fraction}, {"warmup_steps": warmup})
    )
    rates = [np.asarray(share(step)).item() for step in range(steps)]
    assert rates == [np.asarray(number(step)).item() for step in range(steps)]
    assert int(np.argmax(rates)) == warmup


def test_two_epochs_of_a_file_and_a_failure_before_the_first_step(tmp_path, monkeypatch, capsys):
    """Also: what fails before its first step does not stand in the way of what is typed next."""
    experiment = find_module(FINETUNE, "experiment").__file__
    monkeypatch.chdir(tmp_path)
    save_tiny_model("model")
    rows = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(21)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["train", experiment, "--model", "model", "--data", "pairs.jsonl", "--no-export"]
    given += ["--eval-data", "pairs.jsonl", "--preference.epochs", "2"]
    assert main(given) == 2
    assert "more than the model's context of 64" in capsys.readouterr().err
    assert main([*given, "--max-length", "64"]) == 0
    said = "preference: 6 steps, 2 epochs of 21 rows in batches of 8"  # 5.25, rounded up
    assert said in capsys.readouterr().out
    metrics = tmp_path / "runs/finetune/metrics.jsonl"
    before = metrics.read_text()
    assert json.loads(before.splitlines()[-1])["step"] == 6
    assert main([*given, "--max-length", "64"]) == 0  # finished: the same steps again
    assert metrics.read_text() == before


def test_flags_of_a_stage_that_does_not_run_are_told(capsys):
    parse([FINETUNE, "--sft-data", "a.jsonl", "--rollout.prompts", "p.jsonl", "--lora.rank", "4"])
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "has no effect" in line]
    assert [line.split(": ")[1] for line in told] == ["sft_data", "rollout.prompts"]
    assert "the sft stage does not run" in told[0]
    parse([FINETUNE, "--sft-data", "a.jsonl", "--sft.epochs", "1", "--preference.steps", "0"])
    assert "has no effect" not in capsys.readouterr().err


def test_the_model_of_an_earlier_run_is_its_export(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=f"{run}: a run without an export, and without checkpoints"):
        parse([FINETUNE, "--model", str(run)])
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"{run}: a run without an export; make one with jaxalign"):
        parse([FINETUNE, "--model", str(run)])
    (run / "export").mkdir()
    assert parse([FINETUNE, "--model", str(run)]).model == str(run / "export")


TWO = ("--data", "a.jsonl", "b.jsonl")
PRETRAINED = ("--pretrain.steps", "1", "--text", "t.txt")
LABELLED = ("--preference.steps", "0", "--feedback.steps", "1", "--feedback.data", "f.jsonl")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lora.alpha", "8"), "lora.alpha: has no effect, since no adapters"),
        (("--lora.alpha", "8", "--lora.rank", "4"), None),
        (
            ("--lora.rank", "4", "--preference.steps", "0", *PRETRAINED),
            "no stage that runs trains adapters",
        ),
        (("--model", "folder", "--architecture.width", "64"), "the architecture is that of folder"),
        (("--architecture.width", "64"), None),
        (("--holdout", "0.2", "--eval-data", "e.jsonl"), "no stage that runs holds records"),
        (("--holdout", "0.2"), None),
        (("--data-temperature", "2"), "no stage that runs mixes sources"),
        (("--data-temperature", "2", *TWO), None),
        ((*LABELLED, "--eval-data", "e.jsonl"), "no stage that runs evaluates on pairs"),
        ((*LABELLED, "--sft.steps", "1", "--eval-data", "e.jsonl"), None),
        ((*LABELLED, "--holdout", "0.2"), None),
    ],
)
def test_flags_that_other_flags_leave_without_effect_are_told(flags, told, capsys):
    parse([FINETUNE, *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert len(lines) == (told is not None)
    assert all(told in line for line in lines)


def test_typed_options_of_a_loss_replace_those_of_the_experiment_and_it_is_told(tmp_path, capsys):
    experiment = tmp_path / "mine.py"
    experiment.write_text(
        "from jaxalign.config import PreferenceConfig, TrainConfig\n\n\n"
        "def config():\n"
        "    stage = PreferenceConfig(steps=1, loss='dpo', loss_options={'beta': 0.5})\n"
        "    return TrainConfig(preference=stage)\n"
    )
    one = parse([str(experiment), "--loss-options", "label_smoothing", "0.1"])
    assert one.preference.loss_options == {"label_smoothing": 0.1}
    assert "loss_options: replaces its beta 0.5" in capsys.readouterr().err
    other = parse([str(experiment), "--loss", "ipo", "--loss-options", "tau", "0.3"])
    assert other.preference.loss_options == {"tau": 0.3}
    both = ["--loss-options", "beta", "0.2", "label_smoothing", "0.1"]
    assert parse([str(experiment), *both]).preference.loss_options["beta"] == 0.2
    assert "replaces" not in capsys.readouterr().err


# ------------------------------------------------------------------------ files


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_no_file_of_an_experiment_stands_in_the_way_of_typed_data(name, scale, capsys):
    own = load_config(name, scale)
    config = parse([name, "--scale", scale, "--data", "mine.jsonl"])
    assert (config.data, config.eval_data, config.sft.data) == (("mine.jsonl",), (), ())
    assert config.holdout > 0
    notes = capsys.readouterr().err
    for field, value in (("eval_data", own.eval_data), ("sft_data", own.sft.data)):
        assert (f"{field}: " in notes) == bool(value)
    if own.online.runs:
        assert config.online.rollout.prompts == "mine.jsonl"
        assert config.online.rollout.eval_prompts is None
    typed = ["--eval-data", "a.jsonl", "--sft-data", "b.jsonl"]
    if own.sft.responses == "chosen":
        config = parse([name, "--scale", scale, "--data", "mine.jsonl", *typed])
        assert (config.eval_data, config.sft.data) == (("a.jsonl",), ("b.jsonl",))
    assert parse([name, "--scale", scale]).eval_data == own.eval_data


@pytest.mark.parametrize(
    ("name", "flags", "kept"),
    [
        ("experiments/ipo_md/ipo_md.py", ["--rollout.prompts", "p.jsonl"], "rollout.eval_prompts"),
        ("experiments/base_lm/pretrain.py", ["--text", "t.txt"], "eval_text"),
    ],
)
def test_held_out_prompts_and_text_go_with_their_own(name, flags, kept, capsys):
    config = parse([name, "--scale", "paper", *flags])
    assert config.online.rollout.eval_prompts is None
    assert config.pretrain.eval_text == ()
    assert f"{kept}: " in capsys.readouterr().err


# ------------------------------------------------------------------------ rates


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_adapters_have_the_learning_rate_of_adapters(scale):
    def rate(*flags):
        return parse([FINETUNE, "--scale", scale, *flags]).preference.optimizer.learning_rate

    assert rate("--lora.rank", "0") == rate() <= 1e-6
    assert rate("--lora.rank=16") == rate("--lora.rank", "16") >= 10 * rate()
    typed = ["--preference.optimizer.learning-rate", "3e-6"]
    assert rate("--lora.rank", "16", *typed) == rate(*typed) == 3e-6


def test_rates_for_random_weights_are_refused_for_a_large_model_that_was_typed(
    tmp_path, monkeypatch, capsys
):
    experiment = find_module(QUICKSTART, "experiment").__file__
    monkeypatch.chdir(tmp_path)
    save_tiny_model("m")
    assert parse([experiment, "--model", "m"]).model == "m"  # a toy bears them
    monkeypatch.setattr("jaxalign.runs.rates.LARGE", 10)
    assert main(["train", experiment, "--model", "m"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "sft.optimizer: learning rate 0.003" in line
    assert "experiments/finetune.py" in line
    with pytest.raises(UserError, match=r"preference\.optimizer: learning rate 0\.0002"):
        parse([experiment, "--model", "m", "--sft.steps", "0"])
    with pytest.raises(UserError, match=r"sft\.optimizer: learning rate 0\.003 for adapters"):
        parse([experiment, "--model", "m", "--lora.rank", "4"])
    flags = ["--sft.optimizer.learning-rate", "3e-3", "--preference.optimizer.learning-rate=1e-3"]
    assert parse([experiment, "--model", "m", *flags]).model == "m"


@pytest.mark.parametrize(
    ("rule", "rank", "high"),
    [
        ({"learning_rate": 1e-4}, 0, False),
        ({"learning_rate": 2e-4}, 0, True),
        ({"learning_rate": 2e-4, "name": "lion"}, 0, True),
        ({"learning_rate": 2e-4, "name": "sgd"}, 0, False),
        ({"learning_rate": 1e-3, "name": "adafactor", "parameter_scale": True}, 0, False),
        ({"learning_rate": 1e-3}, 8, False),
        ({"learning_rate": 2e-3}, 8, True),
    ],
)
def test_high_rates(rule, rank, high):
    stage = SupervisedConfig(steps=1, optimizer=OptimizerConfig(**rule))
    config = TrainConfig(sft=stage, lora=LoraConfig(rank=rank), model="folder")
    assert list(high_rates(config)) == (["sft"] if high else [])


def test_high_rates_are_told_once_large_weights_are_loaded(capsys, monkeypatch):
    config = TrainConfig(
        sft=SupervisedConfig(steps=1, optimizer=OptimizerConfig(learning_rate=1e-3))
    )
    loaded = TrainConfig(sft=config.sft, model="folder")
    weights = {"kernel": np.zeros(10)}
    warn_of_rates(loaded, weights)  # a toy bears it
    monkeypatch.setattr("jaxalign.runs.train.LARGE", 10)
    warn_of_rates(config, weights)  # so do weights that know nothing yet
    assert capsys.readouterr().err == ""
    warn_of_rates(loaded, weights)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft: learning rate 0.001 for all parameters (1e-7 to 5e-5 is usual)")


def test_prompts_come_from_one_source():
    several = ["experiments/ipo_md/ipo_md.py", "--data", "a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match=r"rollout.prompts: --data names several sources"):
        parse(several)
    assert parse([*several[:2], "a.jsonl:2"]).online.rollout.prompts == "a.jsonl"
    config = parse([*several, "--rollout.prompts", "a.jsonl"])
    assert config.data == ("a.jsonl", "b.jsonl")
    assert config.online.rollout.prompts == "a.jsonl"
