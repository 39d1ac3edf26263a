"""The data card: its numbers against counts by hand, and against the batches of a run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxalign.data import embedded_tokenizer, pair_batches
from jaxalign.data.batches import epoch_positions
from jaxalign.data.card import Reading, data_cards, kind_of, marked_text, script_of
from jaxalign.data.mixtures import weighted_sources
from jaxalign.data.packing import Packing, packed_batches, packed_positions
from jaxalign.data.tokenized import TokenizedResponses
from jaxalign.errors import UserError
from jaxalign.reporting.data_card import card_rows
from tests.data.test_packing import make_alike
from tests.data.test_tokenize import CHATML, NO_SYSTEM

TOKENIZER = embedded_tokenizer()
READING = Reading(tokenizer=TOKENIZER, max_length=32, batch_size=4, chat="never")
SAY = [{"role": "user", "content": "say привет"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [
    {"prompt": "one two three four", "chosen": " a b c d e", "rejected": " z"},
    {"prompt": "one two three four", "chosen": " a b c d e", "rejected": " z"},
    {"prompt": "One, two three four!", "chosen": " x", "rejected": " y"},
    {"prompt": "long", "chosen": " word" * 60, "rejected": " no"},
    {"prompt": "bad", "chosen": "same", "rejected": "same"},
    {"prompt": "bad", "chosen": "same"},
]


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


def card(source, reading=READING, kind=None):
    (found,) = data_cards(weighted_sources(source), reading, kind)
    return found


def test_the_numbers_of_pairs_are_those_counted_by_hand(pairs):
    found = card(pairs)
    assert (found.kind, found.read, found.kept, found.records) == ("pairs", 6, 4, 4)
    assert found.skipped == {"identical responses": 1, "missing field": 1}
    assert found.first_skipped["missing field"].startswith(f"{pairs}:6: missing field")
    assert found.forms == {"plain text": 4}
    assert (found.distinct_prompts, found.near_duplicate_prompts) == (3, 1)
    assert found.repeated_records == 1
    assert (found.longer_than_max_length, found.truncated_responses) == (1, 1)
    chosen, rejected = (found.arrays.responses[name] for name in ("chosen", "rejected"))
    for name, lengths in found.arrays.responses.items():
        texts = [row["prompt"] + row[name] for row in ROWS[:4]]
        whole = [len(TOKENIZER(text).input_ids) + 1 for text in texts]
        assert (found.arrays.prompt + lengths).tolist() == whole
    assert found.lengths["rejected"].largest == rejected.max()
    assert found.lengths["chosen"].largest >= 60
    assert found.longer_chosen == np.mean(chosen > rejected)
    assert found.equal_lengths == np.mean(chosen == rejected)
    assert found.desirable is found.prompts_elsewhere is found.used_an_epoch is None
    assert list(found.scripts) == ["Latin"]
    assert found.positions["packed"].padding <= found.positions["padded"].padding
    assert found.positions["padded"].tokens == found.tokens / 4
    assert json.loads(json.dumps(found.numbers()))["kept"] == 4
    assert "arrays" not in found.numbers()


def test_pairs_that_are_nearly_the_same_are_counted(tmp_path):
    long = "the cat sat on the mat and saw another cat on the other mat"
    rows = [
        {"prompt": "p", "chosen": long, "rejected": f"{long} again"},
        {"prompt": "q", "chosen": long, "rejected": "nothing of the kind"},
    ]
    found = card(write(tmp_path / "near.jsonl", rows))
    assert found.alike == 1
    assert found.arrays.overlap[0] > 0.9 > found.arrays.overlap[1]
    assert 0 < found.common_beginning < 1


def test_labels_turns_and_scripts(tmp_path):
    labelled = [{"prompt": "p", "response": "r", "label": at < 3} for at in range(4)]
    found = card(write(tmp_path / "labelled.jsonl", labelled))
    assert (found.kind, found.desirable, found.alike) == ("labelled", 0.75, None)
    talk = [*SAY, {"role": "assistant", "content": "да"}]
    rows = [
        {"messages": talk},
        {"messages": [{"role": "system", "content": "s"}, *talk, *talk]},
        {"messages": talk, "tools": [{"name": "clock"}]},
    ]
    source = write(tmp_path / "talks.jsonl", rows)
    found = card(source)
    assert found.kind == "responses"
    assert found.forms == {
        "conversations": 3,
        "with a system turn": 1,
        "with tools": 1,
        "with earlier turns of the assistant": 1,
    }
    letters = {"Latin": 3 * 4 + 1, "Cyrillic": 8 * 4}
    total = sum(letters.values())
    assert found.scripts == {
        name: pytest.approx(letters[name] / total) for name in ("Cyrillic", "Latin")
    }


def test_examples_mark_the_scored_tokens(tmp_path):
    talk = [*SAY, {"role": "assistant", "content": "first"}]
    source = write(tmp_path / "talks.jsonl", [{"messages": [*talk, *talk]}])
    for turns, number in (("last", 1), ("all", 2)):
        reading = Reading(tokenizer=TOKENIZER, max_length=256, batch_size=4, turns=turns)
        ((place, (row,)),) = card(source, reading).shown
        assert place == f"{source}:1"
        scored = [text for text, is_scored in row.parts if is_scored]
        assert len(scored) == number
        assert all("first" in text for text in scored)
        assert all("привет" not in text for text in scored)


def test_the_parts_of_a_row_are_the_whole_row(pairs):
    (_, (row, _)), *_ = card(pairs).shown
    assert "".join(text for text, _ in row.parts).count("one two three four") == 1
    rows = make_alike(3).rows
    text = marked_text(TokenizedResponses(rows=rows), 1, TOKENIZER)
    assert [scored for _, scored in text] == [False, True]


def test_sources_of_a_mixture_know_each_other(tmp_path, pairs):
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("long", "other", "third", "x")]
    other = write(tmp_path / "other.jsonl", rows)
    first, second = data_cards(weighted_sources([f"{pairs}:0.5", other]), READING)
    assert (first.prompts_elsewhere, second.prompts_elsewhere) == (1, 1)
    assert (first.used_an_epoch, second.used_an_epoch) == (2, 4)


def test_labels_that_are_numbers_have_a_threshold(tmp_path, pairs):
    rows = [{"prompt": "p", "response": "r", "score": at} for at in range(4)]
    source = write(tmp_path / "labelled.jsonl", rows)
    assert card(source, replace(READING, threshold=1.5)).desirable == 0.5
    assert card(source).desirable == 0.5  # of 0 and 1; the others are skipped
    with pytest.raises(UserError, match="threshold: no source has labelled responses"):
        card(pairs, replace(READING, threshold=1.5))


def test_records_that_the_template_refuses_are_counted(tmp_path):
    roles = ("system", "user", "user", "system")
    rows = [
        {"prompt": [{"role": role, "content": "Say."}], "response": "r", "label": at < 1}
        for at, role in enumerate(roles)
    ]
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = NO_SYSTEM + CHATML
    found = card(write(tmp_path / "x.jsonl", rows), replace(READING, tokenizer=tokenizer))
    assert (found.records, found.refused, found.examples, found.desirable) == (4, 2, 2, 0.0)
    assert found.notes == [f"{tmp_path}/x.jsonl:1: the chat template refuses it: no system turn"]
    lines = {line[0]: line[1] for line in card_rows([found], max_length=32, batch_size=4)}
    assert lines["refused by the chat template"].startswith("2 ")


def test_what_is_no_record_is_refused(tmp_path):
    nothing = write(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(UserError, match="no row with chosen and rejected"):
        kind_of(nothing)
    with pytest.raises(UserError, match="no usable record"):
        card(nothing, kind="pairs")
    assert kind_of("embedded") == "pairs"


@pytest.mark.parametrize(
    ("lines", "split", "said"),
    [
        ("{\n3\n", "", r"x\.jsonl: no usable record; .*x\.jsonl:1: invalid JSON"),
        ("", "", r"x\.jsonl: no records in it"),
        (json.dumps(ROWS[0]), "#[30:10]", r"x\.jsonl#\[30:10\]: no records in it"),
        ('3\n{"a": 1}\n', "", "no row with chosen and rejected"),
    ],
)
def test_a_source_without_usable_rows_says_why(tmp_path, lines, split, said):
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(UserError, match=said):
        card(f"{tmp_path}/x.jsonl{split}")


@pytest.mark.parametrize(
    ("letter", "script"),
    [
        ("a", "Latin"),
        ("Ａ", "Latin"),
        ("漢", "Han"),
        ("я", "Cyrillic"),
        ("1", ""),
        ("か", "Hiragana"),
    ],
)
def test_scripts_are_those_of_unicode(letter, script):
    assert script_of(letter) == script


@pytest.mark.parametrize("joint_share", [0.0, 0.9])
def test_the_positions_are_those_of_the_batches(joint_share):
    examples = make_alike(45)
    order = {"batch_size": 8, "seed": 3}
    computed = real = 0
    for batch in pair_batches(examples, joint_share=joint_share, epochs=1, **order):
        lengths = (batch.prompt_length + batch.response_length).sum(1)
        rows = batch.tokens
        if batch.joint_tokens is not None:
            rows, lengths = batch.joint_tokens, lengths - batch.common_length
        computed += rows.size
        real += lengths[batch.weight > 0].sum()
    assert epoch_positions(examples, joint_share=joint_share, **order) == (real, computed)


def test_the_positions_of_packed_rows_are_the_mean_of_many_batches():
    examples = make_alike(40)
    batches = packed_batches(examples, Packing(), batch_size=8, seed=3, epochs=None)
    rows = [next(batches).packed.segment_ids for _ in range(5 * 20)]
    tokens, positions = packed_positions(examples, Packing(), batch_size=8, seed=3)
    assert {positions} == {row.size for row in rows}
    assert tokens == pytest.approx(np.mean([(row > 0).sum() for row in rows]))
