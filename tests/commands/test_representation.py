"""Representation alignment as users run it: runs, resumption, exports, counts, refusals."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.models import load_pretrained
from jaxalign.models.lora import merge
from jaxalign.models.peft import load_adapters
from jaxalign.runs.experiment import SCALES, load_config
from tests.commands.test_command_line import SMALL, complaint

METHODS = ("instruction_sft", "preferred_sft", "rejected_sft", "hir", "dpo", "reward", "judge")
METHODS += ("policy_gradient", "scit", "dual")
SHORT = ["--alignment.positive", "Be kind.", "--alignment.negative", "Be rude."]
ALIGN = ["--representation.steps", "4", "--representation.batch-size", "8", *SHORT]
ALIGN += ["--representation.save-every", "2", "--representation.eval-every", "2"]
ALIGN += ["--representation.optimizer.learning-rate", "1e-2", "--alignment.lora.rank", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.py").write_text(SMALL)
    return folder


def command(folder, name, *flags):
    return ["train", str(folder / "small.py"), "--output", str(folder), "--name", name, *flags]


@pytest.fixture(scope="module")
def scit(folder):
    """Both stages of RAHF-SCIT in one run."""
    flags = ["--sft.steps", "0", "--loss", "scit_mean", "--max-length", "120", *ALIGN]
    arguments = command(folder, "scit", *flags)
    assert main(arguments) == 0
    return folder / "scit", arguments


@pytest.fixture(scope="module")
def sides(folder):
    """Models tuned on chosen and on rejected responses of one base."""
    found = {}
    for side in ("chosen", "rejected"):
        flags = ["--sft-responses", side, "--preference.steps", "0"]
        flags += ["--sft.optimizer.learning-rate", "1e-2"]
        assert main(command(folder, side, *flags)) == 0
        found[side] = folder / side / "export"
    return found


def lines(run, stage, split):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if (row["stage"], row["split"]) == (stage, split)]


def without_times(rows):
    times = ("tokens_per_second", "mfu", "seconds")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def test_one_command_tunes_fits_exports_and_reports(scit):
    run, _ = scit
    before, *_, after = lines(run, "representation", "eval")
    assert [before["step"], after["step"]] == [0, 4]
    assert before["pattern/projection"] == pytest.approx(0)
    assert after["pattern/drift"] > 0
    assert after["loss"] != before["loss"]
    assert before["kl"] == pytest.approx(0, abs=1e-6)
    assert lines(run, "preference", "eval")
    report = (run / "report" / "report.md").read_text()
    assert "moved along the difference" in report
    assert (run / "report" / "representation.png").is_file()


def test_the_export_is_the_fitted_model_and_the_adapters_lead_there(scit, folder):
    """Base of the fit: the same run without it."""
    run, arguments = scit
    at = arguments.index("--representation.steps") + 1
    alone = [*arguments[:at], "0", *arguments[at + 1 :]]
    alone[alone.index("--name") + 1] = "tuned"
    assert main(alone) == 0
    base, fitted = (load_pretrained(folder / name / "export") for name in ("tuned", "scit"))
    adapters, scale, _ = load_adapters(run / "representation_adapter", base.config)
    expected = merge(base.params, adapters, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, fitted.params)
    for stage, expected in (("preference", base), ("representation", fitted)):
        target = folder / f"converted_{stage}"
        assert main(["convert", str(run), str(target), "--stage", stage]) == 0
        found = load_pretrained(target)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    tokens = np.arange(12)[None] % 7
    assert not np.allclose(base(tokens), fitted(tokens), atol=1e-6)


def test_a_run_that_stopped_goes_on_to_the_same_numbers(scit, folder):
    run, arguments = scit
    copy = folder / "copy" / "scit"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "representation" / "4")
    again = [*arguments]
    again[again.index("--output") + 1] = str(folder / "copy")
    assert main(again) == 0
    for split in ("train", "eval"):
        expected, found = (
            without_times(lines(one, "representation", split)) for one in (run, copy)
        )
        assert found == expected


def test_dual_fits_the_difference_of_two_models(folder, sides):
    flags = ["--sft.steps", "0", "--preference.steps", "0", "--alignment.method", "dual"]
    flags += ["--model", str(sides["chosen"]), "--alignment.negative-model", str(sides["rejected"])]
    assert main(command(folder, "dual", *flags, *ALIGN, "--alignment.distance", "norm")) == 0
    first, *_, last = lines(folder / "dual", "representation", "eval")
    assert first["pattern/norm"] > 0
    # five times the difference away: the distance, not squared
    np.testing.assert_allclose(first["loss"], 5 * first["pattern/norm"], rtol=1e-4)
    assert last["loss"] < first["loss"]


def test_stimuli_left_out_are_counted_in_the_report(folder):
    rows = [{"prompt": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(30)]
    rows[3]["prompt"] = "word " * 200
    rows[5]["prompt"] = " "
    rows.insert(7, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nAssistant: c"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(path), "--eval-data", str(path), "--sft.steps", "0"]
    flags += ["--preference.steps", "0", "--max-length", "60", *ALIGN]
    flags += ["--alignment.responses", "chosen"]
    assert "no shared prompt" in main_complaint(command(folder, "counted", *flags))
    assert main([*command(folder, "counted2", *flags), "--bad-records", "skip"]) == 0
    data = json.loads((folder / "counted2" / "data.json").read_text())
    found = data["train_stimuli"]
    assert found["skipped"] == {"stimulus too long": 1, "no query": 1}
    assert found["first"]["no query"] == f"{path}:6"
    report = (folder / "counted2" / "report" / "report.md").read_text()
    assert f"1 skipped for stimulus too long (first: {path}:4" in report


def main_complaint(arguments):
    from jaxalign.commands.experiment import parse
    from jaxalign.errors import UserError
    from jaxalign.runs.train import train

    with pytest.raises(UserError) as caught:
        train(parse(arguments[1:]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alignment.method", "dual"], "alignment.negative_model: dual compares two models"),
        (["--alignment.layers", "0", "1"], "alignment.layers: [0, 1]; the model has layers 1 to 1"),
        (["--alignment.lora.rank", "0"], "alignment.lora.rank: 0, but this stage trains adapters"),
        (["--max-length", "9"], "no stimulus is left"),
        (["--sft-data", "a.jsonl", "--sft-responses", "rejected"], "sft_responses: rejected"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, words, folder, capsys):
    name = f"refused_{flags[0].strip('-')}"
    arguments = command(folder, name, "--sft.steps", "0", "--preference.steps", "0", *ALIGN, *flags)
    assert words in complaint(capsys, *arguments)


@pytest.mark.parametrize("scale", SCALES)
def test_every_method_of_the_comparison_builds_its_config(scale):
    for name in METHODS:
        config = load_config(f"experiments/rahf/methods.py:{name}", scale)
        assert dataclasses.is_dataclass(config)
        steps = [getattr(config, stage).steps for stage in ("sft", "preference", "online")]
        assert sum(steps) + config.representation.steps > 0
