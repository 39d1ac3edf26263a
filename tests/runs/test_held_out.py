"""Evaluating without training: the numbers that the run itself logged."""

import json

import pytest

import jaxalign
from jaxalign.cli import main
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig, with_fields
from jaxalign.errors import UserError
from jaxalign.evaluation.reward_models import RewardModel
from jaxalign.runs.held_out import evaluate
from tests.tiny_model import save_tiny_model

RECORDS = [
    {"prompt": f"Say {n}", "chosen": f"{n} it is", "rejected": "no " * (n % 3 + 1)}
    for n in range(12)
]
STAGE = PreferenceConfig(steps=3, batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    save_tiny_model(folder / "model")
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "pairs.jsonl").write_text(text)
    return folder


def trained(folder, **fields):
    pairs = str(folder / "pairs.jsonl")
    config = TrainConfig(
        output=str(folder / "runs"),
        model=str(folder / "model"),
        data=pairs,
        eval_data=pairs,
        preference=STAGE,
        max_length=60,
    )
    run = jaxalign.train(with_fields(config, **fields))
    return run, pairs, [line for line in run.lines if line["split"] == "eval"][-1]


def test_a_run_is_evaluated_as_it_was_at_its_end(folder, capsys):
    run, pairs, line = trained(folder, name="dpo")
    metrics = evaluate(str(run.folder), pairs, max_length=60, batch_size=5)
    assert metrics.pop("pairs") == 12
    assert metrics["rewards/margins"] != 0
    for name, value in metrics.items():
        assert value == pytest.approx(line[name], rel=1e-3, abs=1e-5), name
    alone = evaluate(str(run.folder / "export"), pairs, max_length=60)
    assert not {"loss", "kl", "rewards/chosen"} & set(alone)
    assert alone["logps/chosen"] == pytest.approx(line["logps/chosen"], rel=1e-4)
    simpo = evaluate(str(run.folder / "export"), pairs, max_length=60, loss="simpo")
    assert simpo["loss"] == pytest.approx(
        evaluate(str(run.folder), pairs, max_length=60, loss="simpo")["loss"], rel=1e-5
    )
    ipo = evaluate(str(run.folder), pairs, max_length=60, loss="ipo", loss_options={"tau": 0.5})
    assert ipo["loss"] != pytest.approx(metrics["loss"], rel=1e-2)
    command = ["evaluate", "--model", str(run.folder), "--data", pairs, "--max-length", "60"]
    assert main([*command, "--limit", "5", "--json", str(folder / "numbers.json")]) == 0
    assert json.loads((folder / "numbers.json").read_text())["pairs"] == 5
    printed = capsys.readouterr()
    assert "rewards/accuracies" in printed.out
    assert f"compared with {folder / 'model'}, from which the run was started" in printed.err


def test_a_run_in_a_format_of_its_own_is_evaluated_in_it(folder):
    run, pairs, line = trained(folder, name="format", prompt_format="Q: {prompt} A: ")
    metrics = evaluate(str(run.folder), pairs, max_length=60)
    for name in ("logps/chosen", "rewards/margins"):
        assert metrics[name] == pytest.approx(line[name], rel=1e-3, abs=1e-5), name


def test_what_is_cut_and_left_out_is_said(folder, capsys):
    (folder / "faulty.jsonl").write_text((folder / "pairs.jsonl").read_text() + '{"prompt": "a"}\n')
    data = str(folder / "faulty.jsonl")
    evaluate(str(folder / "model"), data, max_length=4, bad_records="skip")
    said = capsys.readouterr().err
    assert "12 of 13 records; skipped 1" in said
    assert "truncated responses: 24" in said


def test_a_run_that_began_with_an_adapter_has_no_reference_of_its_own(folder, capsys):
    run = folder / "began_with_an_adapter"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    config = {"model": str(folder / "model"), "adapter": "elsewhere/adapter"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "export").symlink_to(folder / "model")
    metrics = evaluate(str(run), str(folder / "pairs.jsonl"), max_length=60)
    assert not {"loss", "kl", "rewards/chosen"} & set(metrics)
    assert "set --reference" in capsys.readouterr().err


def test_a_reward_model_is_evaluated_by_its_own_scores(folder):
    run, pairs, line = trained(folder, name="reward", loss="bradley_terry")
    metrics = evaluate(str(run.folder), pairs)
    assert metrics["rewards/accuracies"] == pytest.approx(line["rewards/accuracies"])
    scored = RewardModel.load(run.folder / "export")
    prompts, chosen, rejected = ([x[key] for x in RECORDS] for key in RECORDS[0])
    better = scored.rewards(prompts, chosen) > scored.rewards(prompts, rejected)
    assert metrics["rewards/accuracies"] == pytest.approx(better.mean())
    assert 0 <= metrics["calibration/error"] <= 1
    for given, flag in (
        ({"max_length": 4}, "--max-length"),
        ({"prompt_format": "X{prompt}"}, "--prompt-format"),
        ({"tokenizer": "nowhere"}, "--tokenizer"),
        ({"reference": "nowhere"}, "--reference"),
        ({"loss": "ipo"}, "--loss"),
        ({"loss_options": {"beta": 1.0}}, "--loss-options"),
    ):
        with pytest.raises(UserError, match=f"{flag}: has no effect"):
            evaluate(str(run.folder), pairs, **given)
