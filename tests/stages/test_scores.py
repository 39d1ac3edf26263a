"""Training reward and preference models as users do: runs, resumption, folders, refusals."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.config import EntanglementConfig, PreferenceConfig, TrainConfig
from jaxalign.data.embedded import embedded_preferences, embedded_tokenizer
from jaxalign.errors import UserError
from jaxalign.evaluation import make_annotator
from jaxalign.models import EncoderDecoder, EncoderDecoderConfig, load_pretrained, save_pretrained
from jaxalign.models.encoder_decoder import init_params
from jaxalign.models.score import ScoreModel
from tests.commands.test_command_line import SMALL, complaint

KINDS = {"bradley_terry": "reward", "preference_model": "preference"}
SHORT = " A: {first} B: {second} better:"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, and one with adapters."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.py").write_text(SMALL)
    common = ["train", str(folder / "small.py"), "--output", str(folder), "--preference.steps", "4"]
    common += ["--preference.save-every", "2", "--max-length", "96", "--comparison-format", SHORT]
    common += ["--preference.eval-every", "2"]
    flags = {
        "bradley_terry": [],
        "preference_model": ["--preference.micro-batches", "2"],
        "lora": ["--lora.rank", "2", "--share-prompts", "always"],
    }
    commands = {}
    for name, own in flags.items():
        loss = "bradley_terry" if name == "lora" else name
        commands[name] = [*common, "--name", name, "--loss", loss, *own]
        assert main(commands[name]) == 0
    return folder, commands


def lines(run):
    times = ("tokens_per_second", "mfu")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


@pytest.mark.parametrize("loss", KINDS)
def test_the_export_is_an_annotator_that_knows_its_kind_and_format(runs, loss):
    folder, _ = runs
    run = folder / loss
    model = load_pretrained(run / "export")
    assert isinstance(model, ScoreModel)
    form = model.config.source_fields["jaxalign"]
    assert form["kind"] == KINDS[loss]
    assert (form["max_length"], form["comparison_format"]) == (96, SHORT)
    last = lines(run)[-1]
    bias = last["rewards/chosen"] if loss == "bradley_terry" else 0
    assert form["reward_bias"] == bias
    pair = next(iter(embedded_preferences()))
    asked = [pair.prompt], [pair.chosen], [pair.rejected]
    by_run = make_annotator(f"{KINDS[loss]}:{run}").preferences(*asked).preference
    by_export = make_annotator(f"{KINDS[loss]}:{run / 'export'}").preferences(*asked).preference
    assert by_run == by_export
    assert 0 < by_run[0] < 1


def test_an_annotator_says_what_the_evaluation_said(runs):
    """The same held-out preferences through texts as through the training batches."""
    from jaxalign.data import preference_records, split_holdout

    folder, _ = runs
    records = list(preference_records("embedded"))
    held_out = split_holdout(records, TrainConfig().holdout, seed=0)[1][:16]
    asked = [[str(getattr(x, name)) for x in held_out] for name in ("prompt", "chosen", "rejected")]
    for loss, kind in KINDS.items():
        found = make_annotator(f"{kind}:{folder / loss}").preferences(*asked)
        last = lines(folder / loss)[-1]
        np.testing.assert_allclose(found.preference.mean(), last["preferences/chosen"], atol=1e-5)
        if kind == "preference":
            assert found.order_consistency == pytest.approx(last["preferences/consistency"])


@pytest.mark.parametrize("name", ["bradley_terry", "lora"])
def test_convert_makes_the_export_again(runs, name, tmp_path):
    folder, _ = runs
    assert main(["convert", str(folder / name), str(tmp_path / "hf")]) == 0
    for file in ("config.json", "model.safetensors"):
        found, expected = (f / file for f in (tmp_path / "hf", folder / name / "export"))
        assert found.read_bytes() == expected.read_bytes(), file
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "again")]) == 0
    trees = [load_pretrained(tmp_path / again).params for again in ("hf", "again")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(runs):
    folder, commands = runs
    run, kept = folder / "lora", folder / "kept"
    shutil.copytree(run, kept)
    shutil.rmtree(run / "checkpoints" / "preference" / "4")
    shutil.rmtree(run / "export")
    assert main(commands["lora"]) == 0
    assert lines(run) == lines(kept)
    for file in ("config.json", "model.safetensors"):
        assert (run / "export" / file).read_bytes() == (kept / "export" / file).read_bytes()


def test_an_adapter_folder_holds_the_head_for_peft(runs):
    from safetensors.numpy import load_file

    folder, _ = runs
    fields = json.loads((folder / "lora" / "adapter" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tensors = load_file(folder / "lora" / "adapter" / "adapter_model.safetensors")
    head = load_file(folder / "lora" / "export" / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], head)


def test_the_report_shows_calibration_and_order(runs):
    folder, _ = runs
    text = (folder / "preference_model" / "report" / "report.md").read_text()
    assert "| both orders name one winner |" in text
    assert "## Calibration of preference_model" in text


def test_commands_that_need_log_probs_refuse_a_reward_model(runs, capsys):
    folder, _ = runs
    export = str(folder / "bradley_terry" / "export")
    line = complaint(capsys, "entangle", "--model", export, "--data", "embedded")
    assert line.endswith("has a scalar head and no log-probs")


@pytest.mark.slow
def test_a_reward_model_can_be_trained_further_and_as_nothing_else(runs, capsys, tmp_path):
    folder, _ = runs
    export = str(folder / "bradley_terry" / "export")
    common = ["train", str(folder / "small.py"), "--output", str(tmp_path), "--model", export]
    line = complaint(capsys, *common, "--sft.steps", "0")
    assert "has a scalar head and no log-probs; set --loss bradley_terry" in line
    flags = ["--sft.steps", "0", "--loss", "bradley_terry", "--name", "on"]
    flags += ["--preference.optimizer.learning-rate", "0.0", "--max-length", "96"]
    assert main([*common, *flags]) == 0
    before, after = (load_pretrained(f).params for f in (export, tmp_path / "on" / "export"))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("loss", KINDS)
def test_a_t5_is_trained_the_same_way(runs, loss, tmp_path):
    folder, _ = runs
    shape = {"width": 16, "layers": 1, "decoder_layers": 1, "heads": 2, "head_width": 8}
    config = EncoderDecoderConfig(vocab_size=512, mlp_width=24, **shape)
    params = init_params(config, jax.random.key(0))
    model = EncoderDecoder(config, params)
    save_pretrained(model, tmp_path / "t5", tokenizer=embedded_tokenizer())
    flags = ["--model", str(tmp_path / "t5"), "--output", str(tmp_path), "--sft.steps", "0"]
    flags += ["--loss", loss, "--max-length", "96", "--name", "run"]
    assert main(["train", str(folder / "small.py"), *flags]) == 0
    annotator = make_annotator(f"{KINDS[loss]}:{tmp_path / 'run'}")
    there = annotator.preferences(["where?"], ["here"], ["nowhere"]).preference[0]
    assert there == 1 - annotator.preferences(["where?"], ["nowhere"], ["here"]).preference[0]


def test_what_makes_no_sense_is_refused():
    for loss in KINDS:
        for field, value in (("every", 1), ("mask", "differing")):
            entanglement = EntanglementConfig(**{field: value})
            stage = PreferenceConfig(loss=loss, entanglement=entanglement)
            with pytest.raises(UserError, match=rf"entanglement\.{field}: {loss} trains scores"):
                TrainConfig(preference=stage)
    for loss, said in (
        ("preference_model", "loss_options: preference_model has no beta; it has none"),
        ("bradley_terry", "it has margin, centering"),
    ):
        with pytest.raises(UserError, match=said):
            TrainConfig(preference=PreferenceConfig(loss=loss, loss_options={"beta": 0.1}))
    with pytest.raises(UserError, match=r"comparison_format: .* must contain \{first\} once"):
        TrainConfig(
            preference=PreferenceConfig(loss="preference_model"),
            comparison_format="{first} or {first}?",
        )


def test_a_step_is_planned_without_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL.replace("def config()", "def config(scale)"))
    plans = {}
    for loss in ("dpo", "bradley_terry"):
        flags = ["--topology", "cpu:4", "--stage", "preference", "--loss", loss]
        flags += ["--json", f"{loss}.json"]
        assert main(["plan", "small.py", *flags]) == 0
        (plans[loss],) = json.loads((tmp_path / f"{loss}.json").read_text())
    assert plans["dpo"]["lasting"]["frozen"] > 0
    assert plans["bradley_terry"]["lasting"]["frozen"] == 0
