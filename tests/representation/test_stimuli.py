"""Templates, stimuli and what is left out, against the specification of RAHF's data."""

from dataclasses import replace

import numpy as np
import pytest

from jaxalign.data import PreferenceRecord, embedded_tokenizer, tokenize_pairs
from jaxalign.errors import UserError
from jaxalign.representation import (
    INSTRUCTIONS,
    Tokenization,
    contrastive_pairs,
    default_layers,
    hindsight_rows,
    make_instructions,
    responses_of,
    stimulus_batches,
    tokenize_stimuli,
)
from jaxalign.representation.instructions import ADJECTIVES, ATTRIBUTES
from jaxalign.representation.stimuli import instructed
from tests.data.test_tokenize import CHATML

FORMAT = "Human: {prompt}\n\nAssistant: "
TOKENIZER = embedded_tokenizer()
TOLD = make_instructions("short", positive="Be kind.", negative="Be rude.")


def records(*prompts):
    return [
        PreferenceRecord(
            prompt=prompt, chosen=f"Yes, {prompt}.", rejected="No!", source="some.jsonl", line=at
        )
        for at, prompt in enumerate(prompts, start=1)
    ]


def how(max_length=400, **options):
    form = {"tokenizer": TOKENIZER, "max_length": max_length, "prompt_format": FORMAT} | options
    return Tokenization(**form)


def text(tokens):
    return TOKENIZER.decode(list(map(int, tokens)), skip_special_tokens=True)


def test_the_instructions_are_opposite_slot_by_slot_in_one_template():
    """Three adjectives, fourteen attributes, and the same sentences but for the slots."""
    told = INSTRUCTIONS["paper"]
    assert (len(ADJECTIVES), len(ATTRIBUTES)) == (3, 14)
    for at, instruction in enumerate((told.positive, told.negative)):
        for pair in (*ADJECTIVES, *ATTRIBUTES):
            assert f" {pair[at]}" in instruction
        assert ("should be", "might be")[at] in instruction
        assert ("Never share falsehoods", "when necessary")[at] in instruction
        assert instruction.startswith(INSTRUCTIONS["short"].positive if not at else "You are a bad")
    as_one = [
        told.positive.replace("should be", "might be"),
        told.negative,
    ]
    for good, bad in sorted((*ADJECTIVES, *ATTRIBUTES), key=lambda pair: -len(pair[0])):
        as_one[0] = as_one[0].replace(f" {good}", f" <{bad}>", 1)
        as_one[1] = as_one[1].replace(f" {bad}", f" <{bad}>", 1)
    assert as_one[0].split(". If")[0] == as_one[1].split(". If")[0]


@pytest.mark.parametrize(
    ("depth", "method", "expected"),
    [
        (32, "scit", (10, 12, 14, 16, 18)),
        (32, "dual", (10, 12, 14, 16, 18, 20)),
        (5, "scit", (2, 3)),
        (1, "scit", (1,)),
    ],
)
def test_the_paper_s_layers_as_shares_of_the_depth(depth, method, expected):
    assert default_layers(depth, method) == expected


def test_a_stimulus_reads_instruction_empty_line_and_the_prompt_in_its_format():
    one = responses_of(records("hello"), "chosen")
    streams = tokenize_stimuli(one, how(), (None, TOLD.positive, TOLD.negative)).streams
    prompts = [text(rows[0][: rows.prompt_length[0]]) for rows in streams]
    plain = "Human: hello\n\nAssistant: "
    assert prompts == [plain, f"Be kind.\n\n{plain}", f"Be rude.\n\n{plain}"]
    answers = [rows[0][rows.prompt_length[0] :] for rows in streams]
    assert text(answers[0]) == "Yes, hello."
    assert answers[0][-1] == TOKENIZER.eos_token_id
    for other in answers[1:]:
        np.testing.assert_array_equal(other, answers[0])


def test_the_plain_row_is_what_training_without_instructions_reads():
    both = responses_of(records("hello", "good day"), "both")
    plain = tokenize_stimuli(both, how(), (None,)).streams[0]
    pairs, _ = tokenize_pairs(
        records("hello", "good day"), TOKENIZER, max_length=400, prompt_format=FORMAT
    )
    np.testing.assert_array_equal(plain.flat, pairs.rows.flat)
    np.testing.assert_array_equal(plain.prompt_length, pairs.rows.prompt_length)


def test_conversations_get_the_instruction_as_the_system_s_turn():
    turns = [{"role": "user", "content": "hello"}]
    system = {"role": "system", "content": "Be kind."}
    assert instructed(turns, "Be kind.", strings_as_chat=False) == [system, *turns]
    assert instructed("hello", "Be kind.", strings_as_chat=True) == [system, *turns]
    assert instructed("hello", "Be kind.", strings_as_chat=False) == "hello"


def test_plain_prompts_of_a_chat_model_get_it_too():
    """Unless a prompt format of the user's own, or `never`, keeps them plain text."""
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    records_ = responses_of(records("hello"), "chosen")
    for options, expected in (
        ({"prompt_format": "{prompt}"}, "[system] Be kind. [user] hello [assistant] Yes, hello. "),
        ({"prompt_format": "{prompt}", "chat": "never"}, "Be kind.\n\nhelloYes, hello."),
        ({"prompt_format": "Q: {prompt} "}, "Be kind.\n\nQ: hello Yes, hello."),
    ):
        told = tokenize_stimuli(records_, how(tokenizer=tokenizer, **options), ("Be kind.",))
        assert text(told.streams[0][0]) == expected
        assert len(told.report.chat) == ("chat" not in options)


def test_contrastive_pairs_put_the_instruction_that_agrees_first():
    pairs, report = contrastive_pairs(records("hello"), how(), TOLD)
    assert (len(pairs), report.records) == (2, 2)
    shown = [text(pairs.rows[row][: pairs.rows.prompt_length[row]]) for row in range(4)]
    said = [text(pairs.rows[row][pairs.rows.prompt_length[row] :]) for row in range(4)]
    assert [one.split(".")[0] for one in shown] == ["Be kind", "Be rude", "Be rude", "Be kind"]
    assert said == ["Yes, hello."] * 2 + ["No!"] * 2
    assert pairs.record_index.tolist() == [0, 0]


def test_hindsight_puts_each_response_under_what_it_follows():
    rows, _ = hindsight_rows(records("hello", "bye"), how(), TOLD)
    told = [(text(row)[:8], text(row)[-4:]) for row in map(rows.__getitem__, range(4))]
    assert told == [("Be kind.", "llo."), ("Be rude.", " No!"), ("Be kind.", "bye."),
                    ("Be rude.", " No!")]  # fmt: skip
    assert rows.record_index.tolist() == [0, 0, 1, 1]


def test_stimuli_too_long_or_without_a_query_are_named_and_counted():
    """Nothing is cut: a cut would take the instruction first."""
    some = responses_of(records("hello", "  ", "word " * 60, "word " * 70), "chosen")
    found = tokenize_stimuli(some, how(60), (None, TOLD.positive, TOLD.negative))
    assert [len(rows) for rows in found.streams] == [1, 1, 1]
    assert found.report.skipped == {"no query": 1, "stimulus too long": 2}
    assert found.report.first["no query"] == "some.jsonl:2"
    assert found.report.first["stimulus too long"].startswith("some.jsonl:3: ")
    assert found.report.records == 4
    with pytest.raises(UserError, match=r"max_length: 9: .* 1 stimulus too long \(first: some"):
        tokenize_stimuli(some[:1], how(9), (None, TOLD.positive))


def test_one_response_of_a_pair_is_drawn_by_a_fair_coin_that_the_seed_decides():
    pairs = records(*map(str, range(400)))
    drawn = [one.response == "No!" for one in responses_of(pairs, "random", seed=3)]
    assert len(drawn) == 400
    assert abs(np.mean(drawn) - 0.5) < 0.1  # four standard deviations
    assert drawn == [one.response == "No!" for one in responses_of(pairs, "random", seed=3)]
    assert drawn != [one.response == "No!" for one in responses_of(pairs, "random", seed=4)]


def test_batches_align_the_first_positions_of_a_response_in_all_streams():
    some = responses_of(records("hello", "a longer question", "x"), "both")
    streams = tokenize_stimuli(some, how(), (None, TOLD.positive, TOLD.negative)).streams
    seen = set()
    options = {"batch_size": 4, "positions": 8, "epochs": 1, "buckets": 2}
    for batch in stimulus_batches(streams[0], streams[1:], **options):
        assert batch.mask.shape == (4, 8)
        for row, number in enumerate(batch.record_index):
            if batch.weight[row] == 0:
                continue
            seen.add(int(number))
            whole = streams[0][int(number)]
            response = whole[streams[0].prompt_length[number] :][:8]
            assert batch.mask[row].sum() == len(response)
            rows = [(batch.tokens[row], batch.prompt_length[row])]
            sides = zip(batch.stimuli[row], batch.stimuli_prompt_length[row], strict=True)
            for tokens, length in [*rows, *sides]:
                np.testing.assert_array_equal(tokens[length : length + len(response)], response)
    assert seen == set(range(6))


@pytest.mark.parametrize("refused", [(0,), (0, 1, 2, 3)])
def test_stimuli_that_the_template_refuses_stop_or_are_counted(refused):
    tokenizer = embedded_tokenizer()
    # a conversation of two turns is refused only with a system turn before it
    tokenizer.chat_template = (
        "{% if messages | length > 3 and messages[0].role == 'system' %}"
        "{{ raise_exception('too many') }}{% endif %}" + CHATML
    )
    own = [
        PreferenceRecord(
            prompt=[{"role": "user", "content": f"Say {n}."}] * (1 + (n in refused)),
            chosen="It is.",
            rejected="No!",
            source="s.jsonl",
            line=n + 1,
        )
        for n in range(4)
    ]
    form = how(tokenizer=tokenizer, prompt_format="{prompt}")
    with pytest.raises(UserError, match=r"s\.jsonl:1: the chat template refuses it: too many"):
        hindsight_rows(own, form, TOLD)
    skipping = replace(form, bad_records="skip")
    if len(refused) == 4:
        with pytest.raises(
            UserError, match=r"8 responses; 8 refused by the chat .* system turns: --chat"
        ):
            hindsight_rows(own, skipping, TOLD)
        return
    rows, report = hindsight_rows(own, skipping, TOLD)
    expected, _ = hindsight_rows(own[1:], form, TOLD)
    assert rows.record_index.tolist() == [1, 1, 2, 2, 3, 3]
    assert rows.flat.tolist() == expected.flat.tolist()
    assert report.skipped == {"refused by the chat template": 2}
    assert report.summary().startswith("8 responses; 2 refused by the chat template (first: s.jso")
    pairs, _ = contrastive_pairs(own, skipping, TOLD)
    usual, _ = contrastive_pairs(own[1:], form, TOLD)
    assert pairs.rows.flat.tolist() == usual.rows.flat.tolist()
    streams = tokenize_stimuli(responses_of(own, "chosen"), skipping, (None, TOLD.positive))
    assert [one.record_index.tolist() for one in streams.streams] == [[1, 2, 3]] * 2
