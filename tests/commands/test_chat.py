"""`--chat` in every command: what a model of a folder with a chat template reads."""

import json

import pytest

from jaxalign.cli import main
from jaxalign.commands.experiment import parse
from jaxalign.config import TrainConfig, from_json, to_json
from jaxalign.data import load_tokenizer
from jaxalign.data.tokenizers import Encoder
from jaxalign.stages.models import read_run_config
from tests.data.test_plain_prompts import TEMPLATE
from tests.tiny_model import save_tiny_model

PROMPT, CHOSEN, REJECTED = "What is red?", "A ball.", "The sea."
EXPERIMENT = """
from jaxalign.config import *

def config():
    return TrainConfig(
        name="run", model="{model}", data="pairs.jsonl", output="runs", holdout=0.0,
        max_length=300,
        preference=PreferenceConfig(batch_size=8), sft=SupervisedConfig(batch_size=8),
        online=OnlineConfig(batch_size=8, rollout=RolloutConfig(
            prompts="pairs.jsonl", annotator="rule:rules.py:short", max_eval_prompts=0
        )),
        representation=RepresentationConfig(
            batch_size=8, alignment=AlignmentConfig(instructions="short", layers=(1,))
        ),
    )
"""
MODEL, DATA = ["--model", "model"], ["--data", "pairs.jsonl", "--max-length", "100"]
PROMPTS, OUTPUT = ["--prompts", "pairs.jsonl"], ["--output", "out"]
COMMANDS = {
    "sft": ["train", "exp.py", "--sft.steps", "1"],
    "sft-hindsight": ["train", "exp.py", "--sft.steps", "1", "--sft-responses", "hindsight"],
    "preference": ["train", "exp.py", "--preference.steps", "1"],
    "scit": ["train", "exp.py", "--preference.steps", "1", "--loss", "scit"],
    "reward": ["train", "exp.py", "--preference.steps", "1", "--loss", "bradley_terry"],
    "online": ["train", "exp.py", "--online.steps", "1"],
    "representation": ["train", "exp.py", "--representation.steps", "1"],
    "generate": ["generate", *MODEL, *PROMPTS, "--output", "out.jsonl"],
    "entangle": ["entangle", *MODEL, *DATA, *OUTPUT],
    "filter": ["filter", *MODEL, *DATA, *OUTPUT],
    "collect": [
        *("collect", "best-of-n", *MODEL, *PROMPTS, *OUTPUT),
        *("--annotator", "rule:rules.py:short"),
    ],
    "judge": ["judge", "--judge", "lm:model", "--human", "pairs.jsonl", *OUTPUT],
    "aspects": ["judge", "--judge", "aspects:scored:model", "--human", "pairs.jsonl", *OUTPUT],
    "optimize-prompt": [
        *("optimize-prompt", *MODEL, "--seeds", "seeds.jsonl", "--queries", "queries.jsonl"),
        *("--evaluator", "rule:rules.py:short", "--optimizer", "bank:bank.txt", "--examples", "0"),
        *("--validate", "0", "--depth", "1", "--more-depth", "0", *OUTPUT),
    ],
}
LINE = "model: plain prompts go through the chat template, as a user's turn; --chat never"


class Seen(Exception):  # noqa: N818
    """The first text with the prompt in it, and its token ids."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model whose tokenizer has a template, and what the commands read."""
    save_tiny_model(tmp_path / "model", layers=1, context_length=1024)
    with_template(tmp_path / "model", TEMPLATE)
    monkeypatch.chdir(tmp_path)
    pair = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    (tmp_path / "pairs.jsonl").write_text(8 * (json.dumps(pair) + "\n"))
    rows = [json.dumps({"prompt": f"Who ran {at}?", "response": "Tom."}) for at in range(4)]
    (tmp_path / "seeds.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"prompt": f"{PROMPT} {at}"}) for at in range(4)]
    (tmp_path / "queries.jsonl").write_text("\n".join(rows))
    (tmp_path / "bank.txt").write_text("Be kind.\nBe brief.\n")
    (tmp_path / "rules.py").write_text("def short(prompt, response):\n    return 1.0\n")
    (tmp_path / "exp.py").write_text(EXPERIMENT.format(model="model"))
    return tmp_path


def with_template(folder, template):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.fixture
def first_read(monkeypatch):
    """Runs a command up to the first text that holds the prompt."""
    encode = Encoder.encode

    def watched(self, texts):
        encodings = encode(self, texts)
        for text, encoding in zip(texts, encodings, strict=True):
            if PROMPT in text:
                raise Seen(text, list(encoding.ids))
        return encodings

    def run(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(Encoder, "encode", watched)
            with pytest.raises(Seen) as seen:
                main(list(arguments))
        return seen.value.args

    return run


def check_turn(text, ids):
    """The text begins as transformers' own rendering of a user's turn, in its tokens."""
    tokenizer = load_tokenizer("model")
    head, _, said = text.partition("[user]")
    content, _, rest = said.partition(tokenizer.eos_token)
    assert PROMPT in content
    assert rest.startswith("\n[assistant]")
    turns = [{"role": "user", "content": content}]
    if head:
        system = head.removeprefix("[system]").partition(tokenizer.eos_token)[0]
        turns.insert(0, {"role": "system", "content": system})
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids[: len(expected)] == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reads_by_the_same_rule(folder, first_read, name, capsys):
    check_turn(*first_read(*COMMANDS[name]))
    error = capsys.readouterr().err
    told = "lm:model: questions go through" if name == "judge" else LINE
    assert error.count("go through the chat template") == error.count(told) == 1
    text, ids = first_read(*COMMANDS[name], "--chat", "never", *changed(name))
    assert "[user]" not in text
    assert "[assistant]" not in text
    tokenizer = load_tokenizer("model")
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    if name in ("preference", "sft", "reward", "filter", "entangle", "representation"):
        assert text == PROMPT + CHOSEN or text == PROMPT + REJECTED
    if name in ("generate", "online", "collect"):
        assert text == PROMPT
    check_turn(*first_read(*COMMANDS[name], "--chat", "always", *changed(name, "b")))
    assert "--chat" not in capsys.readouterr().err


def changed(name, to="a"):
    """Flags that begin a run of its own."""
    return ["--name", f"run-{to}"] if COMMANDS[name][0] == "train" else []


@pytest.mark.parametrize("name", ["preference", "generate", "judge"])
@pytest.mark.parametrize("kind", ["none", "own"])
def test_without_a_template_and_for_the_embedded_model_nothing_changes(
    folder, first_read, name, kind, capsys
):
    if kind == "none":
        with_template(folder / "model", None)
    else:
        save_tiny_model(folder / "model", layers=1, context_length=1024)
    text, _ = first_read(*COMMANDS[name])
    if name != "judge":
        assert text.startswith(PROMPT)
        assert "--chat" not in capsys.readouterr().err
    else:  # a judge is asked by the template that it has
        assert text.startswith("User: ") == (kind == "own")


def test_a_model_made_here_reads_text_whatever_its_tokenizer(folder, first_read, capsys):
    shape = ["--architecture.width", "16", "--architecture.heads", "2"]
    shape += ["--architecture.kv-heads", "2"]
    own = ["--model", "embedded", "--tokenizer", "model", *shape, "--max-length", "100"]
    text, _ = first_read(*COMMANDS["preference"], *own)
    assert text == PROMPT + CHOSEN
    check_turn(*first_read(*COMMANDS["preference"], *own, "--chat", "always", "--name", "b"))


def test_a_format_of_one_s_own_means_text(folder, first_read, capsys):
    for name in ("preference", "generate", "filter", "collect"):
        text, _ = first_read(*COMMANDS[name], "--prompt-format", "Q: {prompt} A: ")
        assert text.startswith(f"Q: {PROMPT} A: ")
        assert "model: plain prompts stay plain text, in the given" in capsys.readouterr().err


@pytest.mark.parametrize("chat", ["auto", "never"])
def test_a_run_is_asked_as_it_was_trained(folder, first_read, chat, capsys):
    train = [*COMMANDS["preference"], "--max-length", "100", "--chat", chat]
    assert main(train) == 0
    assert capsys.readouterr().err.count(LINE) == (chat == "auto")
    report = (folder / "runs" / "run" / "report" / "report.md").read_text()
    assert ("8 prompts as chat; model: plain prompts go through" in report) == (chat == "auto")
    counts = json.loads((folder / "runs" / "run" / "data.json").read_text())["train_pairs"]
    assert counts["prompts_as_chat"] == (8 if chat == "auto" else 0)
    assert main(["convert", "runs/run", "converted"]) == 0
    for model in ("runs/run", "runs/run/export", "converted"):
        text, ids = first_read("generate", "--model", model, *PROMPTS, "--output", "o.jsonl")
        assert "as it was trained; --chat" in capsys.readouterr().err
        if chat == "auto":
            check_turn(text, ids)
        else:
            assert text == PROMPT
    text, _ = first_read(*train[:-2], "--model", "converted", "--name", "further")
    assert text.startswith("[user]" if chat == "auto" else PROMPT)
    text, _ = first_read(
        *COMMANDS["generate"][:1], "--model", "converted", "--chat", *PROMPTS, *OUTPUT
    )
    assert text.startswith("[user]")  # without a value: always


def test_the_old_name_leads_to_the_new_one(folder, capsys):
    assert main([*COMMANDS["preference"], "--strings-as-chat"]) == 2
    assert "--strings-as-chat: is --chat always now" in capsys.readouterr().err
    assert main([*COMMANDS["preference"], "--chat", "sometimes"]) == 2
    assert "sometimes" in capsys.readouterr().err
    with_template(folder / "model", None)
    assert main([*COMMANDS["generate"], "--chat"]) == 2
    assert "model: chat: always, but the tokenizer has no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "before", "now"),
    [("embedded", False, "auto"), ("m", False, "never"), ("m", True, "always")],
)
def test_a_stored_config_of_before_is_read(tmp_path, model, before, now):
    fields = json.loads(to_json(TrainConfig(model=model)))
    del fields["chat"]
    text = json.dumps(fields | {"strings_as_chat": before})
    assert from_json(text) == TrainConfig(model=model, chat=now)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(text)
    assert read_run_config(tmp_path).chat == now


def test_a_plan_takes_the_flag(folder):
    assert parse(["exp.py", "--chat", "never"]).chat == "never"
    assert parse(["exp.py"]).chat == "auto"
