"""Tokenizers that are larger than the model: every command that pairs the two says so at once."""

import json

import pytest

from jaxalign.cli import main
from jaxalign.data import check_ids, check_vocabulary, embedded_tokenizer
from jaxalign.errors import UserError
from tests.tiny_model import save_tiny_model

CHAT = (
    "{% for m in messages %}<|header|>{{ m.role }}\n{{ m.content }}<|footer|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n{% endif %}"
)
EXPERIMENT = """
from jaxalign.config import PreferenceConfig, TrainConfig

def config():
    return TrainConfig(
        name="run", model="{model}", data="{data}", output="{output}", max_length=32, holdout=0.0,
        preference=PreferenceConfig(steps=1, batch_size=8, loss="dpo"),
    )
"""


def larger_tokenizer(template=CHAT):
    tokenizer = embedded_tokenizer()
    tokenizer.add_tokens(["<|header|>", "<|footer|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """A model of 512 tokens whose tokenizer has two more."""
    save_tiny_model(tmp_path / "model", layers=1)
    larger_tokenizer().save_pretrained(tmp_path / "model")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(8 * (json.dumps(pair) + "\n"))
    return tmp_path


@pytest.mark.parametrize("command", ["generate", "filter", "entangle", "judge", "collect", "train"])
def test_ids_beyond_the_embedding_stop_every_command(folder, command, capsys):
    model, pairs, output = folder / "model", folder / "pairs.jsonl", folder / "out"
    flags = {
        "generate": ["--model", model, "--prompts", pairs, "--output", output / "o.jsonl"],
        "filter": ["--model", model, "--data", pairs, "--max-length", 32, "--output", output],
        "entangle": ["--model", model, "--data", pairs, "--max-length", 32, "--output", output],
        "judge": ["--human", pairs, "--judge", f"lm:{model}", "--output", output],
        "collect": ["best-of-n", "--model", model, "--prompts", pairs, "--output", output],
        "train": [folder / "exp.py"],
    }[command]
    if command == "collect":
        flags += ["--annotator", f"lm:{model}"]
    text = EXPERIMENT.format(model=model, data=pairs, output=output)
    (folder / "exp.py").write_text(text)
    assert main([command, *map(str, flags)]) == 2
    assert (
        "tokenizer: ids up to 513, but the model's vocabulary has 512;" in capsys.readouterr().err
    )
    assert not (output / "o.jsonl").exists()


def test_what_the_template_cannot_write_may_lie_beyond(tmp_path):
    """As Gemma 3's token for images does, in models of text alone."""
    tokenizer = larger_tokenizer(template=None)
    check_vocabulary(tokenizer, 512)
    check_vocabulary(larger_tokenizer(), 514)
    check_vocabulary(larger_tokenizer(), 640)  # padded
    with pytest.raises(UserError, match="ids up to 511, but the model's vocabulary has 500"):
        check_vocabulary(tokenizer, 500)
    tokenizer.eos_token = "<|footer|>"
    with pytest.raises(UserError, match="ids up to 513, but the model's vocabulary has 512"):
        check_vocabulary(tokenizer, 512)
    tokenizer = larger_tokenizer({"default": "x", "tool_use": CHAT})
    with pytest.raises(UserError, match="ids up to 513"):
        check_vocabulary(tokenizer, 512)


def test_a_text_that_holds_such_a_token_is_refused(folder, capsys):
    tokenizer = larger_tokenizer(template=None)
    ids = tokenizer("a <|header|> b").input_ids
    check_ids(ids, tokenizer, 514)
    check_ids([], tokenizer, 512)
    with pytest.raises(UserError, match=r"a text contains '<\|header\|>', id 512, but .* has 512"):
        check_ids(ids, tokenizer, 512)
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    pairs = folder / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a<|footer|>", "chosen": "b", "rejected": "c"}) + "\n")
    flags = ["--model", folder / "model", "--data", pairs, "--output", folder / "o"]
    assert main(["filter", *map(str, flags), "--max-length", "32"]) == 2
    assert "a text contains '<|footer|>', id 513" in capsys.readouterr().err
    flags = ["--model", folder / "model", "--prompts", pairs, "--output", folder / "o.jsonl"]
    assert main(["generate", *map(str, flags), "--max-tokens", "4"]) == 2
    assert "a text contains '<|footer|>', id 513" in capsys.readouterr().err
