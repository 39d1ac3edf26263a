"""Stored tokens are those of the tokeniser, and so are batches of them and their order."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from jaxalign.data import (
    embedded_tokenizer,
    pair_batches,
    preference_records,
    response_records,
    text_batches,
    text_records,
    tokenize_pairs,
    tokenize_responses,
    tokenize_texts,
)
from jaxalign.data import token_store as module
from jaxalign.data.batches import common_lengths
from jaxalign.data.labelled import LabelledRows, labelled_batches
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.data.plain_prompts import PlainPrompts, with_choice
from jaxalign.data.record_index import index_records
from jaxalign.data.sources import PREFERENCES, RESPONSES, TEXTS
from jaxalign.data.token_store import stored_tokens, texts_as_tokens
from jaxalign.data.tokenized import TokenizedResponses
from jaxalign.errors import UserError
from tests.data.test_record_index import Group
from tests.data.test_tokenize import CHATML, byte_level
from tests.data.test_turns import TALK, turns

ROWS = [
    {"prompt": f"Say {n}", "chosen": f"{n} it is " * (n % 5 + 1), "rejected": "no" + "!" * (n % 11)}
    for n in range(80)
]
ALIKE = {"chosen": "same " * 60, "rejected": "same " * 61}  # after truncation
ROWS[7] |= ALIKE
OPTIONS = {"max_length": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, "text": row["chosen"]}) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def store(tmp_path, monkeypatch, source):
    """(tokenize, kind of record) -> stored tokens and counts, in parts of nine records."""
    monkeypatch.setattr(module, "RECORDS", 9)

    def tokens(tokenize, kind=PREFERENCES, source=source, tokenizer=None, **options):
        records, _ = index_records(source, kind, cache=tmp_path, workers=1)
        return stored_tokens(
            tokenize,
            records,
            tokenizer or embedded_tokenizer(),
            cache=tmp_path,
            label="train",
            **{"workers": 1} | options,
        )

    return tokens


def arrays_of(value):
    """Names and arrays of nested dataclasses."""
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if dataclasses.is_dataclass(one):
            yield from arrays_of(one)
        elif isinstance(one, np.ndarray):
            yield field.name, one


def assert_same(found, expected):
    """Bit by bit, and of the same types; what is only stored aside."""
    kept = {name: x for name, x in arrays_of(found) if name != "common"}
    whole = dict(arrays_of(expected))
    assert kept.keys() == whole.keys()
    for name, array in whole.items():
        assert kept[name].dtype == array.dtype, name
        np.testing.assert_array_equal(kept[name], array, err_msg=name)


def test_stored_tokens_are_those_of_the_tokeniser(store, source):
    tokenizer = embedded_tokenizer()
    expected, report = tokenize_pairs(preference_records(source), tokenizer, **OPTIONS)
    pairs, counted = store(tokenize_pairs, **OPTIONS)
    assert_same(pairs, expected)
    assert counted == report
    assert (report.records, report.identical, len(pairs)) == (80, 1, 79)
    assert report.truncated_prompts + report.truncated_responses > 0
    np.testing.assert_array_equal(common_lengths(pairs), common_lengths(expected))
    assert pairs.rows.largest == expected.rows.flat.max()
    rows, counted = store(tokenize_responses, RESPONSES, **OPTIONS)
    expected, report = tokenize_responses(response_records(source), tokenizer, **OPTIONS)
    assert_same(rows, expected)
    assert counted == report
    texts, _ = store(texts_as_tokens, TEXTS)
    expected = tokenize_texts(text_records(source), tokenizer)
    assert_same(texts, expected)
    assert texts.characters == expected.characters


def test_batches_of_stored_tokens_are_those_of_tokens_in_memory(store, source):
    tokenizer = embedded_tokenizer()
    pairs, _ = tokenize_pairs(preference_records(source), tokenizer, **OPTIONS)
    responses, _ = tokenize_responses(response_records(source), tokenizer, **OPTIONS)
    texts = tokenize_texts(text_records(source), tokenizer)
    label = np.arange(80) % 3 > 0
    packing = Packing(shards=2, apart=True)

    def labelled(rows, **how):
        rows = LabelledRows(rows=rows, desirable=label)
        return labelled_batches(rows, max_length=24, mismatched="batch", **how)

    cases = [
        (pairs, store(tokenize_pairs, **OPTIONS)[0], pair_batches, {"joint_share": 1.0}),
        (pairs, store(tokenize_pairs, **OPTIONS)[0], packed_batches, {"packing": packing}),
        (
            TokenizedResponses(rows=responses),
            TokenizedResponses(rows=store(tokenize_responses, RESPONSES, **OPTIONS)[0]),
            packed_batches,
            {"packing": Packing(shards=2)},
        ),
        (responses, store(tokenize_responses, RESPONSES, **OPTIONS)[0], labelled, {}),
        (texts, store(texts_as_tokens, TEXTS)[0], text_batches, {"length": 16}),
    ]
    for whole, stored, make, how in cases:
        order = {"batch_size": 8, "seed": 5, "process_index": 1, "process_count": 2}
        expected = make(whole, **how, **order)
        batches = make(stored, **how, **order)
        for number in range(25):  # more than two epochs
            if number == 12:  # resume
                state = json.loads(json.dumps(batches.get_state()))
                batches = make(stored, **how, **order)
                batches.set_state(state)
            assert_same(next(batches), next(expected))


def test_tokens_are_made_once_and_anew_where_they_depend_on_it(store, tmp_path, monkeypatch):
    def folders():
        return {x.name for x in tmp_path.iterdir() if x.is_dir() and x.name.startswith("train-")}

    work, done = module._tokenize_part, []
    monkeypatch.setattr(
        module, "_tokenize_part", lambda part, **how: (done.append(part.first), work(part, **how))
    )
    first, _ = store(tokenize_pairs, **OPTIONS)
    assert done == list(range(0, 80, 9))
    again, _ = store(tokenize_pairs, **OPTIONS)
    assert len(done) == 9
    assert_same(again, dataclasses.replace(first, common=None))
    known = folders()
    other = embedded_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = PlainPrompts(as_turns=False, prompt_format="Q: {prompt}")
    formatted = with_choice(embedded_tokenizer(), plain)
    tokenizers = ({"tokenizer": other}, {"tokenizer": formatted})
    for changed in ({"max_length": 25}, {"end_token": False}, *tokenizers):
        store(tokenize_pairs, **{**OPTIONS, **changed})
        assert len(folders()) == len(known) + 1, changed
        known = folders()


def test_pairs_that_are_all_alike_are_an_error(store, tmp_path):
    path = tmp_path / "alike.jsonl"
    rows = ({"prompt": f"{n}", **ALIKE} for n in range(20))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no pair is left of 20: .*identical: 20"):
            store(tokenize_pairs, source=str(path), **OPTIONS)


def test_each_process_tokenises_its_own_records(store, source, monkeypatch):
    work, own = module._tokenize_part, {}

    def counted(part, **how):
        name = threading.current_thread().name
        own.setdefault(name, []).extend(range(part.first, part.first + len(part.records)))
        work(part, **how)

    monkeypatch.setattr(module, "_tokenize_part", counted)
    store(tokenize_responses, RESPONSES, max_length=16)  # makes the index, too
    own.clear()
    found = Group(2).run(lambda one: store(tokenize_responses, RESPONSES, processes=one, **OPTIONS))
    expected, report = tokenize_responses(response_records(source), embedded_tokenizer(), **OPTIONS)
    for rows, counted_ in found:
        assert_same(rows, expected)
        assert counted_ == report
    first, second = own.values()
    assert sorted(first + second) == list(range(80))
    assert {len(first), len(second)} == {44, 36}


@pytest.mark.slow
def test_worker_processes_tokenise_alike(store, source):
    pairs, report = store(tokenize_pairs, workers=2, **OPTIONS)
    expected, counted = tokenize_pairs(preference_records(source), embedded_tokenizer(), **OPTIONS)
    assert_same(pairs, expected)
    assert report == counted


def test_which_tokens_of_conversations_are_scored_is_stored(store, tmp_path):
    """Of single turns in some parts and several in others."""
    tokenizer = byte_level()
    talks = [
        {"prompt": TALK[:1], "chosen": TALK[1:end], "rejected": turns("no", first="assistant")}
        for end in [2] * 12 + [2, 4, 6, 4]
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in talks))
    options = {"max_length": 200, "chat_template": CHATML}
    expected, report = tokenize_pairs(preference_records(str(path)), tokenizer, **options)
    pairs, counted = store(tokenize_pairs, source=str(path), tokenizer=tokenizer, **options)
    assert expected.rows.scored is not None
    assert_same(pairs, expected)
    assert counted == report
    options["turns"] = "all"
    rows, _ = store(tokenize_responses, RESPONSES, source=str(path), tokenizer=tokenizer, **options)
    assert_same(rows, tokenize_responses(response_records(str(path)), tokenizer, **options)[0])
