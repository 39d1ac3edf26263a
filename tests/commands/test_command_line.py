"""Commands as users type them: what they print, and one clear line where something is wrong."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.commands.experiment import parse
from jaxalign.config import TrainConfig, from_json, to_json
from jaxalign.data.embedded import embedded_tokenizer
from jaxalign.losses import PREFERENCE_LOSSES, REWARD_LOSSES, TOKEN_LOSSES
from jaxalign.models import (
    EncoderDecoder,
    EncoderDecoderConfig,
    load_pretrained,
    save_pretrained,
)
from jaxalign.models.encoder_decoder import init_params
from jaxalign.models.lora import merge
from jaxalign.models.peft import load_adapters
from jaxalign.reporting import read_run
from jaxalign.runs.experiment import SCALES, load_config
from tests.slow import slow

ROOT = Path(__file__).parents[2]
MAKERS = r"^def (config|[a-z]\w*(?=\(scale: str(?:, \*\*how: Any)?\) -> TrainConfig))\("
EXPERIMENTS = (
    "experiments.offline.hh:sft",  # a module by its name
    *sorted(
        f"{path.relative_to(ROOT)}:{name}".removesuffix(":config")
        for path in (ROOT / "experiments").rglob("*.py")
        for name in re.findall(MAKERS, path.read_text(), re.M)
    ),
)
SMALL = """
from jaxalign.config import (
    ArchitectureConfig, OptimizerConfig, PreferenceConfig, SupervisedConfig, TrainConfig,
)

def config():
    rate = OptimizerConfig(learning_rate=1e-3)
    return TrainConfig(
        name="small",
        architecture=ArchitectureConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        max_length=64, max_records=64, max_eval_records=16,
        sft=SupervisedConfig(steps=2, batch_size=8, optimizer=rate),
        preference=PreferenceConfig(steps=3, batch_size=8, optimizer=rate),
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.py").write_text(SMALL)
    assert main(["train", str(folder / "small.py"), "--output", str(folder)]) == 0
    return folder / "small"


def complaint(capsys, *arguments):
    """The one line that a wrong command prints; its status is checked."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    (line,) = [text for text in err.splitlines() if text.startswith("jaxalign")]
    return line


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_experiment_builds_its_config(name, scale):
    config = load_config(name, scale)
    assert from_json(to_json(config)) == config


def test_fields_are_set_on_the_command_line(folder):
    config = parse(
        ["small.py", "--loss", "ipo", "--loss-options", "tau", "0.2", "--lora.rank", "4"]
    )
    assert (config.preference.loss, config.lora.rank) == ("ipo", 4)
    assert config.preference.loss_options == {"tau": 0.2}
    assert parse(["small.py", "--preference.optimizer.name", "lion"]).preference.steps == 3
    mixed = ["small.py", "--loss", "dpo:1.0", "sft:0.2", "--loss-options", "dpo.beta", "0.3"]
    config = parse([*mixed, "--seed", "3"])
    assert (config.preference.loss, config.seed) == ("dpo:1.0 sft:0.2", 3)
    assert config.preference.loss_options == {"dpo.beta": 0.3}


def test_an_experiments_loss_options_belong_to_its_loss(folder):
    options = 'PreferenceConfig(loss_options={"beta": 0.3}, '
    (folder / "beta.py").write_text(SMALL.replace("PreferenceConfig(", options, 1))
    assert parse(["beta.py", "--seed", "1"]).preference.loss_options == {"beta": 0.3}
    assert parse(["beta.py", "--loss", "ipo"]).preference.loss_options == {}
    flags = ["beta.py", "--loss-options", "label_smoothing", "0.1"]
    assert parse(flags).preference.loss_options == {"label_smoothing": 0.1}


def test_help_shows_each_field_with_its_documentation(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in TrainConfig.__dataclass_fields__:
        flag = name.replace("_", "-")
        assert f"--{flag}" in shown, name
    assert "Decoupled decay of matrices" in shown


def test_wrong_commands_are_named(capsys, folder):
    assert "no such experiment file" in complaint(capsys, "train", "absent.py")
    assert "neither a Python file nor a module" in complaint(capsys, "train", "no_module")
    assert "'huge' is not one of tiny, paper" in complaint(
        capsys, "train", "small.py", "--scale", "huge"
    )
    assert "'dqo' is neither FILE.py:FUNCTION nor one of" in complaint(
        capsys, "train", "small.py", "--loss", "dqo"
    )
    assert "dpo has no tau; it has beta" in complaint(
        capsys, "train", "small.py", "--loss-options", "tau", "1"
    )
    assert "'dqo' cannot be in a weighted sum" in complaint(
        capsys, "train", "small.py", "--loss", "dqo:1", "sft:1"
    )
    assert "beta: in a mixture, name the loss" in complaint(
        capsys, "train", "small.py", "--loss", "dpo:1", "sft:1", "--loss-options", "beta", "1"
    )
    assert "sft has no beta; it has none" in complaint(
        capsys, "train", "small.py", "--loss", "dpo:1", "sft:1", "--loss-options", "sft.beta", "1"
    )
    assert "sft.batch_size: 7 is not a multiple of sft.micro_batches: 2" in complaint(
        capsys, "train", "small.py", "--sft.batch-size", "7", "--sft.micro-batches", "2"
    )
    (folder / "empty.py").write_text("")
    assert "no function config()" in complaint(capsys, "train", "empty.py")
    (folder / "other.py").write_text("def config():\n    return 3\n")
    assert "returned int, not a TrainConfig" in complaint(capsys, "train", "other.py")
    assert main(["tarin"]) == 2


NAMES = ("own", "known")
OWN_LOSSES = """
import jax
from jaxalign.losses import PairLogProbs, TokenLogProbs

def hinge(pairs: PairLogProbs, *, beta=0.1):
    return jax.nn.relu(1 - beta * pairs.margin)

def centred(pairs: PairLogProbs):
    return jax.nn.softplus(pairs.margin.mean() - pairs.margin)

def of_tokens(tokens: TokenLogProbs):
    return -(tokens.chosen * tokens.chosen_mask).sum(-1)

def reduced(pairs: PairLogProbs):
    return pairs.margin.mean()
"""


def test_a_loss_of_ones_own_is_trained(folder):
    (folder / "own.py").write_text(OWN_LOSSES)
    options = ["--loss-options", "beta", "0.2", "delta", "1"]
    for name, loss in zip(NAMES, ("own.py:hinge", "slic_norm"), strict=True):
        flags = options if name == "known" else options[:3]
        arguments = ["train", "small.py", "--name", name, "--loss", loss, *flags]
        assert main([*arguments, "--no-export"]) == 0
    own, known = (read_run(folder / "runs" / n).curve("preference", "eval", "loss") for n in NAMES)
    assert own == known


@pytest.mark.slow
def test_every_other_step_is_watched_and_the_update_is_the_same(folder, capsys):
    arguments = ["train", "small.py", "--no-export", "--output"]
    assert main([*arguments, "plain", "--packing", "never", "--profile", "1"]) == 0
    for stage in ("sft", "preference"):
        [trace] = (folder / "plain/small/profile" / stage).rglob("perfetto_trace.json.gz")
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        steps = [event for event in events if event.get("name") == stage]
        assert len(steps) == 1, "one step is traced, under the stage's name"
    watch = ["--entanglement.every", "2", "--entanglement.realised"]
    assert main([*arguments, "watched", *watch]) == 0
    plain, watched = (read_run(folder / name / "small") for name in ("plain", "watched"))
    losses = [run.curve("preference", "train", "loss")[1] for run in (plain, watched)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    steps, cosines = watched.curve("preference", "train", "entanglement/cosine")
    assert steps == [1, 3]
    assert all(-1 <= cosine <= 1 for cosine in cosines)
    report = (folder / "watched" / "small" / "report" / "report.md").read_text()
    assert "ideal: chosen up, rejected down" in report
    assert (folder / "watched" / "small" / "report" / "entanglement.png").is_file()
    assert "entanglement" not in (folder / "plain" / "small" / "report" / "report.md").read_text()


def test_a_ledger_is_kept_and_resumed(folder):
    flags = ["train", "small.py", "--no-export", "--preference.save-every", "2"]
    flags += ["--entanglement.ledger", "2"]
    assert main(flags) == 0
    run = read_run(folder / "runs" / "small")
    file = run.folder / "ledger.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["pairs_of"]) for line in lines] == [
        (step, name) for step in (1, 3) for name in ("batch", "held_out")
    ]
    at = "entanglement/ledger/"
    for line, before in zip(lines[:2], ("", "held_out/"), strict=True):
        changes = [sum(pair["chosen"].values()) for pair in line["pairs"]]
        steps, realised = run.curve("preference", "train", f"{at}{before}realised_chosen")
        assert steps == [1, 3]
        assert np.mean(changes) == pytest.approx(realised[0], rel=1e-4, abs=1e-6)
        assert line["tokens"]["rejected"]
    report = (run.folder / "report" / "report.md").read_text()
    assert "Where the change came from" in report

    whole = file.read_text()
    shutil.rmtree(run.folder / "checkpoints" / "preference" / "3")
    assert main(flags) == 0
    resumed = [json.loads(line) for line in file.read_text().splitlines()]
    assert resumed == [json.loads(line) for line in whole.splitlines()]


@pytest.mark.parametrize("cure", ["normalised", slow("centred")])
def test_a_cured_run_is_ideal_throughout(folder, cure):
    flags = ["--entanglement.every", "1", "--entanglement.cure", cure, "--no-export"]
    assert main(["train", "small.py", *flags, "--preference.micro-batches", "2"]) == 0
    run = read_run(folder / "runs" / "small")
    assert run.curve("preference", "train", "entanglement/ideal")[1] == [1.0] * 3


@pytest.mark.slow
def test_masks_and_the_preconditioned_geometry_of_a_run(folder):
    flags = ["train", "small.py", "--entanglement.every", "1", "--no-export"]
    assert main([*flags, "--entanglement.mask", "learned", "--name", "learned"]) == 0
    run = read_run(folder / "runs" / "learned")
    shares = run.curve("preference", "train", "mask/chosen")[1]
    assert shares[0] == pytest.approx(1 / (1 + np.exp(-2)), rel=1e-5)
    differing = ["--entanglement.mask", "differing", "--lora.rank", "2", "--name", "differing"]
    assert main([*flags, *differing, "--entanglement.preconditioned"]) == 0
    run = read_run(folder / "runs" / "differing")
    assert np.isfinite(run.curve("preference", "train", "entanglement/adamw/cosine")[1]).all()


def test_what_cannot_be_watched_is_named(capsys, folder):
    own = ["train", "small.py", "--entanglement.every", "1", "--loss", "tdpo1"]
    assert "entanglement.every: tdpo1" in complaint(capsys, *own)
    masked = ["train", "small.py", "--entanglement.mask", "learned", "--reference", "precomputed"]
    assert "set --reference live" in complaint(capsys, *masked)
    other = ["train", "small.py", "--entanglement.preconditioned"]
    assert "needs the optimiser adamw" in complaint(
        capsys, *other, "--preference.optimizer.name", "sgd"
    )
    for field, value in (("loss", "tdpo1"), ("entanglement.mask", "differing")):
        kept = ["train", "small.py", "--entanglement.ledger", "1", f"--{field}", value]
        assert "entanglement.ledger: " in complaint(capsys, *kept)
    half = ["train", "small.py", "--entanglement.reweighting", "centred"]
    assert "set --entanglement.every 1" in complaint(capsys, *half)


def test_an_encoder_decoder_is_trained_and_exported(capsys, folder):
    tokenizer = embedded_tokenizer()
    config = EncoderDecoderConfig(
        vocab_size=len(tokenizer),
        width=16,
        layers=1,
        decoder_layers=1,
        heads=2,
        head_width=8,
        mlp_width=24,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    save_pretrained(EncoderDecoder(config, params), folder / "t5", tokenizer=tokenizer)
    (folder / "sft.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 20)
    train = ["train", "small.py", "--model", "./t5", "--sft-data", "sft.jsonl"]
    assert main([*train, "--lora.rank", "2", "--sft.steps", "60", "--name", "t5run"]) == 0
    run = read_run(folder / "runs" / "t5run")
    _, losses = run.curve("sft", "train", "loss")
    assert losses[-1] < 0.9 * losses[0]
    before, _ = run.first_and_last("preference", "loss")
    assert before == pytest.approx(np.log(2), abs=1e-3)
    exported = load_pretrained(run.folder / "export")
    assert exported.config == config
    # the adapters of both stages, as PEFT reads them, are what was merged
    base = load_pretrained(folder / "t5")
    adapters, scale, _ = load_adapters(run.folder / "adapter", config)
    merged = merge(base.params, adapters, scale)
    assert main(["convert", str(run.folder), str(folder / "converted")]) == 0
    for other in (merged, load_pretrained(folder / "converted").params):
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
        jax.tree.map(close, exported.params, other)
    again = [
        "--adapter",
        str(run.folder / "adapter"),
        "--sft.steps",
        "0",
        "--preference.steps",
        "1",
    ]
    rate = ["--preference.optimizer.learning-rate", "0"]
    assert main([*train, *again, *rate, "--name", "again"]) == 0
    unchanged = load_pretrained(folder / "runs" / "again" / "export").params
    np.testing.assert_allclose(
        unchanged["encoder"]["layers"]["q"]["kernel"],
        exported.params["encoder"]["layers"]["q"]["kernel"],
        atol=1e-5,
    )
    line = complaint(capsys, *train, "--pretrain.steps", "1", "--name", "text")
    assert "packed text is for decoders" in line


def test_a_wrong_loss_of_ones_own_is_named_before_training(capsys, folder):
    (folder / "own.py").write_text(OWN_LOSSES)
    train = ("train", "small.py", "--name", "wrong", "--loss")
    assert "own.py has no function absent" in complaint(capsys, *train, "own.py:absent")
    assert "no such loss file" in complaint(capsys, *train, "absent.py:hinge")
    assert "instead of one value per pair" in complaint(capsys, *train, "own.py:reduced")
    assert "own.py:hinge has no tau; it has beta" in complaint(
        capsys, *train, "own.py:hinge", "--loss-options", "tau", "1"
    )


def test_wrong_inputs_are_named(capsys, folder):
    assert "absent.jsonl" in complaint(capsys, "train", "small.py", "--data", "./absent.jsonl")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    line = complaint(capsys, "train", "small.py", "--data", "bad.jsonl", "--name", "b")
    assert "bad.jsonl" in line
    assert "rejected" in line
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba" in complaint(
        capsys, "train", "small.py", "--model", "./model", "--tokenizer", "./model", "--name", "c"
    )
    line = complaint(capsys, "convert", str(folder), "out")
    assert f"{folder}/config.json: missing; a model folder has" in line


def test_divergence_stops_with_the_records_of_the_batch(capsys, folder):
    arguments = ["train", "small.py", "--sft.optimizer.learning-rate", "1e30", "--name", "nan"]
    line = complaint(capsys, *arguments, "--sft.steps", "6", "--sft.optimizer.clip-norm", "None")
    assert "not finite" in line
    assert "embedded:" in line
    assert "--nonfinite skip" in line


def test_divergence_is_skipped_and_counted_where_asked(folder):
    flags = ["--sft.optimizer.learning-rate", "1e30", "--sft.optimizer.clip-norm", "None"]
    flags += ["--nonfinite", "skip", "--sft.steps", "6", "--preference.steps", "0"]
    assert main(["train", "small.py", *flags]) == 0
    lines = (folder / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    skipped = [x["skipped"] for x in map(json.loads, lines) if x["split"] == "train"]
    assert skipped[0] == 0
    assert skipped[-1] >= 1


def test_records_that_are_skipped_are_counted_in_the_run_folder(folder):
    rows = [{"prompt": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(20)]
    del rows[4]["chosen"]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", "some.jsonl", "--bad-records", "skip", "--sft.steps", "1", "--name", "some"]
    assert main(["train", "small.py", *flags, "--preference.steps", "1", "--no-export"]) == 0
    counts = json.loads((folder / "runs" / "some" / "data.json").read_text())["data"]
    assert (counts["read"], counts["skipped"]) == (20, {"missing field": 1})
    assert counts["first"]["missing field"].startswith("some.jsonl:5")


def test_run_folder_holds_what_a_reader_needs(run):
    for name in ("config.json", "environment.json", "data.json", "model.json", "metrics.jsonl"):
        assert (run / name).is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert (last["stage"], last["split"], last["step"]) == ("preference", "eval", 3)
    for name in ("loss", "logps/chosen", "rewards/margins", "rewards/accuracies", "kl"):
        assert np.isfinite(last[name]), name
    trained = [line for line in lines if line["split"] == "train"]
    assert all(line["tokens_per_second"] > 0 for line in trained)
    assert not any("mfu" in line for line in trained)  # what a CPU could do is not known
    assert list((run / "tensorboard").iterdir())
    assert "| reward margin |" in (run / "report" / "report.md").read_text()


def test_run_converts_to_hugging_face_to_orbax_and_back(run, tmp_path, capsys):
    folders = [tmp_path / name for name in ("hf", "orbax", "again")]
    for source, target in zip([run, *folders], folders, strict=False):
        assert main(["convert", str(source), str(target)]) == 0
    exported, first, last = (
        load_pretrained(folder).params for folder in (run / "export", folders[0], folders[2])
    )
    jax.tree.map(np.testing.assert_array_equal, exported, first)
    jax.tree.map(np.testing.assert_array_equal, exported, last)
    capsys.readouterr()
    assert "exists already" in complaint(capsys, "convert", str(run), str(folders[0]))
    assert "no checkpoint 2" in complaint(
        capsys, "convert", str(run), str(tmp_path / "x"), "--step", "2"
    )
    error = complaint(capsys, "convert", str(run), str(tmp_path / "x"), "--stage", "feedback")
    assert "stage feedback has no intact checkpoint" in error
    assert "stages with checkpoints are" in error


def test_report_compares_runs(run, tmp_path, capsys):
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| held-out pairs | small | small |" in text
    assert "0.6931 → " in text
    assert "no config.json" in complaint(capsys, "report", str(tmp_path))


def test_losses_are_listed_with_formula_and_source(capsys):
    assert main(["losses"]) == 0
    shown = capsys.readouterr().out
    for name in PREFERENCE_LOSSES | TOKEN_LOSSES | REWARD_LOSSES:
        assert name in shown
    assert main(["losses", "dpo"]) == 0
    assert "arXiv:2305.18290" in capsys.readouterr().out
    assert "dqo" in complaint(capsys, "losses", "dqo")
    assert main(["losses", "dpo:1", "sft:0.2"]) == 0
    shown = capsys.readouterr().out
    assert "dpo.beta=0.1" in shown
    assert "arXiv:2404.19733" in shown


def test_page_of_losses_is_fresh(request):
    from jaxalign.losses.table import losses_markdown

    page = (request.config.rootpath / "docs" / "losses.md").read_text(encoding="utf-8")
    assert losses_markdown() == page


def test_import_is_light():
    """`import jaxalign` and the help pull in none of the heavy libraries."""
    code = (
        "import sys, jaxalign.cli; jaxalign.cli.main(['--help']); "
        "print([m for m in ('jax', 'flax', 'transformers', 'torch', 'tensorflow', "
        "'matplotlib', 'grain', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
