"""Commands read a GGUF file as they read the folder it was made from."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxalign.backends.local import LocalModel, end_tokens
from jaxalign.cli import main
from jaxalign.config import TrainConfig
from jaxalign.data import load_tokenizer
from jaxalign.evaluation.language_models import language_model
from jaxalign.gguf import read_gguf
from jaxalign.models import load_pretrained
from jaxalign.stages.models import model_of
from tests.gguf_files import bpe_metadata, write_gguf
from tests.tiny_model import save_tiny_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPERIMENT = """
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig

def config():
    rate = OptimizerConfig(learning_rate=1e-3)
    return TrainConfig(
        name="small", max_length=64,
        preference=PreferenceConfig(steps=1, batch_size=8, optimizer=rate),
    )
"""
ROWS = [
    {"prompt": "Say it.", "chosen": "The cat is here.", "rejected": "The dog is here."},
    {"prompt": "Why?", "chosen": "Because it rains all day.", "rejected": "Go away now."},
]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A tiny model's folder and its GGUF file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer, _ = save_tiny_model(tmp_path / "folder", context_length=400)
    write_gguf(tmp_path / "folder", tmp_path / "model.gguf", metadata=bpe_metadata(tokenizer))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "small.py").write_text(EXPERIMENT)
    return "folder", "model.gguf"


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_convert_writes_the_folder_it_was_made_from(models, tmp_path, capsys):
    folder, file = models
    assert main(["convert", file, "made"]) == 0
    original, made = load_pretrained(folder), load_pretrained("made")
    assert made.config == original.config
    same(made, original)
    before, after = (AutoTokenizer.from_pretrained(name) for name in (folder, "made"))
    text = "<|begin|>It's 12 caf\u00e9s,\n\n  here <|end|>"
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
    ends = json.loads((tmp_path / "made" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [before.eos_token_id] == end_tokens(file, len(before))
    assert main(["convert", file, "half", "--dtype", "bfloat16"]) == 0
    assert load_pretrained("half", dtype=None).params["embed"]["embedding"].dtype == "bfloat16"
    assert main(["convert", file, "other", "--step", "3"]) == 2
    assert "--step: " in capsys.readouterr().err
    assert main(["convert", "absent.gguf", "other"]) == 2
    assert "absent.gguf: no such file" in capsys.readouterr().err


def test_generate_does_the_same(models, capsys):
    texts = []
    for name in models:
        flags = ["--prompts", "pairs.jsonl", "--max-tokens", "4", "--output", f"{name}.jsonl"]
        assert main(["generate", "--model", name, *flags]) == 0
        lines = Path(f"{name}.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["response"] for line in lines])
    assert texts[0] == texts[1]


def test_judges_agree_and_know_another_file(models):
    _, file = models
    judges = [language_model(name) for name in models]
    asked = ["Say it."], ["The cat."], ["The dog."]
    first, second = (list(judge.answers(*asked)) for judge in judges)
    assert str(first) == str(second)
    before = LocalModel.load(file).identity, language_model(file).identity
    os.utime(file, (1, 1))
    after = LocalModel.load(file).identity, language_model(file).identity
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_a_plan_knows_its_architecture(models):
    config = model_of(TrainConfig(model="model.gguf"))
    assert config == load_pretrained("folder").config


def metadata_of(file):
    return {key: x for key, x in read_gguf(file).metadata.items() if key.startswith("tokenizer")}


def test_training_starts_from_it_and_is_written_as_it_was_read(models, capsys):
    data = ["--data", "pairs.jsonl", "--eval-data", "pairs.jsonl", "--lora.rank", "2"]
    for name in models:
        flags = ["--model", name, "--name", name.split(".")[0]]
        assert main(["train", "small.py", *data, *flags]) == 0
    trained = load_pretrained("runs/folder/export")
    same(trained, load_pretrained("runs/model/export"))
    for name in ("folder", "model"):
        assert main(["convert", f"runs/{name}", f"{name}.out.gguf"]) == 0
        same(trained, load_pretrained(f"{name}.out.gguf"))
        assert read_gguf(f"{name}.out.gguf").metadata["general.name"] == name
    assert metadata_of("model.out.gguf") == metadata_of(models[1])
    capsys.readouterr()
    assert main(["convert", "runs/model", "model.out.gguf"]) == 2
    assert "model.out.gguf: exists already; name a file that does not" in capsys.readouterr().err
    assert main(["convert", "runs/model", "other", "--dtype", "q8_0"]) == 2
    assert "only GGUF files have q8_0; name a TARGET that ends in" in capsys.readouterr().err


def test_convert_writes_it_from_a_folder_and_from_another_file(models, tmp_path, capsys):
    folder, file = models
    assert main(["convert", folder, "made.gguf"]) == 0
    same(load_pretrained("made.gguf"), load_pretrained(folder))
    before, after = AutoTokenizer.from_pretrained(folder), load_tokenizer("made.gguf")
    text = "<|begin|>It's 12 caf\u00e9s,\n\n  here <|end|>"
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
    assert end_tokens("made.gguf", len(before)) == [before.eos_token_id]
    assert main(["convert", file, "half.gguf", "--dtype", "float16"]) == 0
    assert metadata_of("half.gguf") == metadata_of(file)
    assert load_pretrained("half.gguf", dtype=None).params["embed"]["embedding"].dtype == "float16"
    assert main(["convert", folder, "orbax"]) == 0
    assert main(["convert", "orbax", "other.gguf"]) == 2
    assert "orbax: an Orbax folder has no tokenizer" in capsys.readouterr().err
    assert main(["convert", str(FIXTURES / "models" / "glm"), "other.gguf"]) == 2
    assert "model_type: 'glm' cannot be written as GGUF; cohere2, " in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))
