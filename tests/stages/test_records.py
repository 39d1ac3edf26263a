"""What a run says of its records: what is skipped, held out, cut, and trained on as well."""

import json

import pytest

from jaxalign.config import TrainConfig, with_fields
from jaxalign.data import embedded_tokenizer
from jaxalign.data.plain_prompts import plain_prompts, with_choice
from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig
from jaxalign.stages import feedback, online
from jaxalign.stages.inputs import Inputs
from tests.data.test_tokenize import CHATML, NO_SYSTEM

SHAPE = DecoderConfig(
    vocab_size=512, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8,
    context_length=64,
)  # fmt: skip


def pair(number, words=1):
    return {"prompt": f"Say {number}", "chosen": "yes " * words, "rejected": f"no {number}"}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def lines(tmp_path, capsys):
    """The lines that reading and tokenising the pairs of a config prints."""

    def of(**fields):
        config = with_fields(TrainConfig(bad_records="skip", max_length=32), **fields)
        Inputs(config, embedded_tokenizer(), tmp_path, SHAPE, (0, 1)).pairs.preferences()
        return capsys.readouterr().out.splitlines()

    return of


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_held_out_records_with_a_prompt_of_the_training_records_are_told(
    tmp_path, lines, streaming
):
    train = write(tmp_path / "train.jsonl", [pair(n) for n in range(6)])
    held_out = write(tmp_path / "held.jsonl", [pair(n, words=2) for n in range(4, 9)])
    apart = write(tmp_path / "apart.jsonl", [pair(n) for n in range(6, 9)])
    said = lines(data=(train,), eval_data=(held_out, apart), streaming=streaming)
    told = "eval_data: 2 of 8 records have a prompt that is also trained on; they are evaluated "
    assert any(line.startswith(told) for line in said)
    said = lines(data=(train,), eval_data=(apart,), streaming=streaming)
    assert not [line for line in said if "trained on" in line]


def test_responses_of_their_own_say_nothing_of_pairs_that_are_not_used(tmp_path, capsys):
    rows = [{"prompt": f"Say {n}", "response": "yes"} for n in range(9)]
    config = with_fields(
        TrainConfig(data=(str(tmp_path / "absent.jsonl"),), max_length=32, holdout=0.3),
        **{"sft_data": (write(tmp_path / "sft.jsonl", rows),)},
    )
    inputs = Inputs(config, embedded_tokenizer(), tmp_path, SHAPE, (0, 1))
    data = inputs.pairs.responses()
    assert len(data.train) + len(data.held_out) == 9
    assert all(" responses: " in line for line in capsys.readouterr().out.splitlines())


def test_what_is_skipped_and_cut_is_told(tmp_path, lines):
    rows = [*(pair(n) for n in range(6)), "{", pair(6, words=90)]
    train = write(tmp_path / "train.jsonl", rows)
    said = lines(data=(train,), holdout=0.0)
    assert any(line.startswith(f"{train}: 7 of 8 records; skipped 1 ") for line in said)
    (counts,) = [line for line in said if line.startswith("train pairs: ")]
    assert counts.startswith("train pairs: 7 records, ")
    assert "truncated responses: 1" in counts


def test_a_fraction_that_holds_nothing_out_is_told(tmp_path, lines):
    train = write(tmp_path / "train.jsonl", [pair(n) for n in range(4)])
    told = "data: --holdout 0.001 holds out none of 4 records: nothing is evaluated"
    assert told in lines(data=(train,), holdout=0.001)
    assert told not in lines(data=(train,), holdout=0.0)


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_labels_stay_with_their_responses_where_a_template_refuses_records(
    tmp_path, capsys, streaming
):
    def row(number):
        role = "system" if number % 3 == 0 else "user"
        turns = [{"role": role, "content": "Say it."}, {"role": "user", "content": "Please."}]
        return {"prompt": turns, "completion": f"{number}", "label": number % 2 == 0}

    source = write(tmp_path / "labelled.jsonl", map(row, range(12)))
    config = with_fields(
        TrainConfig(bad_records="skip", max_length=64, holdout=0.0, output=str(tmp_path)),
        streaming=streaming,
        **{"feedback.steps": 1, "feedback.data": (source,)},
    )
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = NO_SYSTEM + CHATML
    data = feedback.load(config, Inputs(config, tokenizer, tmp_path, SHAPE, (0, 1)))
    numbers = [1, 2, 4, 5, 7, 8, 10, 11]
    assert data.train.rows.record_index.tolist() == numbers
    assert data.train.desirable.tolist() == [number % 2 == 0 for number in numbers]
    assert "train labelled: 12 records, " in (said := capsys.readouterr().out)
    assert f"refused: 4 (as {source}:1: the chat template refuses it" in said


@pytest.mark.parametrize("end_token", [True, False])
def test_responses_to_prompts_end_as_the_flag_says_whatever_the_export_did(tmp_path, end_token):
    rows = [{"prompt": f"Say {n}", "response": "yes"} for n in range(4)]
    names = {"prompts": write(tmp_path / "p.jsonl", rows), "algorithm": "spin"}
    names |= {"max_prompt_length": 40, "max_tokens": 16}
    config = with_fields(
        TrainConfig(holdout=0.0, end_token=end_token),
        **{"online.steps": 1, **{f"rollout.{name}": value for name, value in names.items()}},
    )
    tokenizer = embedded_tokenizer()
    exported = with_choice(tokenizer, plain_prompts(tokenizer), end_token=False)
    for reader in (tokenizer, exported):
        data = online.load(config, Inputs(config, reader, tmp_path, SHAPE, (0, 1)))
        assert {int(one[-1]) == reader.eos_token_id for one in data.responses} == {end_token}


@pytest.mark.parametrize("algorithm", ["online_dpo", "spin"])
def test_prompts_that_the_template_refuses_are_counted(tmp_path, capsys, algorithm):
    def row(number):
        role = "system" if number % 3 == 0 else "user"
        turns = [{"role": role, "content": "Say it."}, {"role": "user", "content": "Please."}]
        return {"prompt": turns, "response": f"{number}"}

    source = write(tmp_path / "p.jsonl", map(row, range(9)))
    names = {"prompts": source, "algorithm": algorithm, "annotator": "rule:none.py:none"}
    names |= {"max_prompt_length": 40, "max_tokens": 16}
    config = with_fields(
        TrainConfig(holdout=0.0, bad_records="skip"),
        **{"online.steps": 1, **{f"rollout.{name}": value for name, value in names.items()}},
    )
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = NO_SYSTEM + CHATML
    inputs = Inputs(config, tokenizer, tmp_path, SHAPE, (0, 1))
    data = online.load(config, inputs)
    assert data.sources == [f"{source}:{number + 1}" for number in (1, 2, 4, 5, 7, 8)]
    assert len(data.train) == len(data.train_texts) == 6
    assert len(data.responses) == (6 if algorithm == "spin" else 0)
    said = capsys.readouterr().out
    assert f"6 of 9 records; skipped 3 refused by the chat template (first: {source}:1: " in said
    assert inputs.report["prompts"]["skipped"] == {"refused by the chat template": 3}
    stopping = with_fields(config, bad_records="error")
    with pytest.raises(UserError, match=r"p\.jsonl:1: the chat template refuses it: no system"):
        online.load(stopping, Inputs(stopping, tokenizer, tmp_path, SHAPE, (0, 1)))
