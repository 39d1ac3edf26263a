"""Conversations of several turns: what the assistant wrote is scored, the rest is read."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxalign.data import (
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_pairs,
    tokenize_responses,
)
from jaxalign.data.labelled import LabelledRows, labelled_batches
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.data.records import Conversation, PreferenceRecord, PromptResponseRecord
from jaxalign.data.tokenized import TokenizedPairs, TokenizedResponses, check_whole_responses
from jaxalign.errors import UserError
from tests.data.test_packing import make_alike
from tests.data.test_tokenize import CHATML, HEADERS, INSTRUCTIONS, byte_level, metaspace

TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}
KINDS = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # CHATML with blocks; without a first system turn
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}END{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (  # leaves out the thoughts of earlier turns
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else "
    "m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def turns(*contents, first="user"):
    """Turns of the user and the assistant, in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]


TALK = turns("hello", "hi there, you", "why?", "because it can", "12 + 30?", "it is 42")


def responses(tokenizer, conversation, which="all", *, cut=1, tools=(), **options):
    """The rows of a conversation whose last turns are the response, and the report."""
    prompt = Conversation(conversation[:-cut], tools=tools)
    record = PromptResponseRecord(prompt=prompt, response=conversation[-cut:], source="f", line=1)
    options = {"max_length": 500} | options
    return tokenize_responses([record], tokenizer, turns=which, **options)


def pair(tokenizer, prompt, chosen, rejected, **options):
    record = PreferenceRecord(prompt=prompt, chosen=chosen, rejected=rejected, source="f", line=1)
    return tokenize_pairs([record], tokenizer, **{"max_length": 500} | options)


def scored_texts(tokenizer, rows, row=0):
    """The text of each run of scored tokens."""
    at = rows.scored_in(row)
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    return [tokenizer.decode(rows[row][run]) for run in runs]


@pytest.mark.parametrize("role", ["User", "user ", "human ", "observations", "Assistant"])
def test_a_role_that_is_not_known_is_refused_with_its_turn(role, tmp_path):
    """It would be taken for the assistant's, and its tokens scored."""
    talk = [*turns("hello"), {"role": role, "content": "no"}]
    row = {"prompt": talk, "chosen": turns("yes", first="assistant")}
    row["rejected"] = turns("no", first="assistant")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    words = rf"jsonl:1: unknown role: turn 2 of prompt is of role '{role}'"
    with pytest.raises(UserError, match=words):
        list(preference_records(str(tmp_path / "pairs.jsonl")))


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_what_a_tool_returned_is_not_scored_whatever_its_role_is_called(role):
    tokenizer = TOKENIZERS["byte_level"]
    talk = turns("hello", "a call", "what came back", "it is 42")
    talk[2] = {"role": role, "content": "what came back"}
    rows, _ = responses(tokenizer, talk, chat_template=CHATML)
    found = [text.split("<|im_end|>")[0].strip() for text in scored_texts(tokenizer, rows)]
    assert found == ["a call", "it is 42"]


@KINDS
@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (SMOLLM2, "<|im_end|>"), (HEADERS, "<|eot_id|>"), (INSTRUCTIONS, "")],
    ids=["chatml", "smollm2", "headers", "instructions"],
)
def test_all_turns_of_the_assistant_are_scored_with_their_ends(tokenizer, template, end):
    rows, report = responses(tokenizer, TALK, chat_template=template)
    said = [turn["content"] for turn in TALK[1::2]]
    ends = [f"{end}"] * 2 + [f"{end}</s>"] if end else ["</s>"] * 3
    found = [text.strip() for text in scored_texts(tokenizer, rows)]
    assert found == [text + end for text, end in zip(said, ends, strict=True)]
    assert report.user_turns == 1
    # the tokens are those of the conversation, whatever is scored
    last, _ = responses(tokenizer, TALK, "last", chat_template=template)
    np.testing.assert_array_equal(rows.flat, last.flat)
    assert last.scored is None
    np.testing.assert_array_equal(rows.scored_in(0)[-len(last.scored_in(0)) :], last.scored_in(0))


@KINDS
@pytest.mark.parametrize("talk", [TALK, [{"role": "system", "content": "be good"}, *TALK]])
def test_blocks_of_the_template_are_the_mask_of_transformers(tokenizer, talk):
    encoded = tokenizer.apply_chat_template(
        talk,
        chat_template=MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = (list(encoded[name]) for name in ("input_ids", "assistant_masks"))
    rows, _ = responses(tokenizer, talk, chat_template=MARKED, end_token=False)
    last = len(mask) - mask[::-1].index(1)  # what follows the last scored token is left out
    begin = len(rows.flat) - last  # what begins a text
    own = np.zeros(len(rows.flat), int)
    own[rows.scored_in(0)] = 1
    assert rows.flat[begin:].tolist() == ids[:last]
    assert own[begin:].tolist() == mask[:last]
    assert sum(mask) == own.sum()
    # by position, without the blocks, the same tokens and the newline after each turn are scored
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    other, _ = responses(tokenizer, talk, chat_template=plain, end_token=False)
    np.testing.assert_array_equal(other.flat[: len(rows.flat)], rows.flat)
    texts = (scored_texts(tokenizer, x) for x in (rows, other))
    assert [f"{text}\n" for text in next(texts)] == next(texts)


def test_the_token_that_ends_a_turn_is_scored_where_a_block_leaves_it_out():
    tokenizer = TOKENIZERS["byte_level"]
    template = MARKED.replace("END{% endgeneration %}", "{% endgeneration %}</s>")
    rows, _ = responses(tokenizer, TALK, chat_template=template)
    said = [turn["content"] for turn in TALK[1::2]]
    assert scored_texts(tokenizer, rows) == [f"{text}</s>" for text in said]


def test_a_conversation_may_contain_the_marks_of_blocks():
    tokenizer = TOKENIZERS["byte_level"]
    talk = turns("\ue0000\ue001", "\ue0001\ue001 hi", "why?", "\ue000 so")
    rows, _ = responses(tokenizer, talk, chat_template=MARKED)
    found = scored_texts(tokenizer, rows)
    assert found == ["\ue0001\ue001 hiEND", "\ue000 soEND", "</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = TOKENIZERS["byte_level"]
    talk = turns("hello", "<think>hm</think>hi", "why?", "<think>so</think>because")
    with pytest.raises(UserError, match=r"f:1: the chat template renders turn 2 differently once"):
        responses(tokenizer, talk, chat_template=REWRITING)
    rows, _ = responses(tokenizer, talk, "last", chat_template=REWRITING)
    assert scored_texts(tokenizer, rows) == ["<think>so</think>because</s>"]
    begin, end = "{% if m.role == 'assistant' %}{% generation %}", "{% endgeneration %}{% endif %}"
    assert "]{{ m" in REWRITING
    assert "}}</s>" in REWRITING
    other = "{% if m.role != 'assistant' %}{{ m.content }}</s>{% endif %}"
    marked = REWRITING.replace("]{{ m", f"]{begin}{{{{ m", 1).replace("}}</s>", f"}}}}</s>{end}")
    marked = marked.replace("{% endfor %}", other + "{% endfor %}")
    rows, _ = responses(tokenizer, talk, chat_template=marked)
    assert scored_texts(tokenizer, rows) == ["hi</s>", "<think>so</think>because</s>"]


@KINDS
@pytest.mark.parametrize("template", [CHATML, HEADERS, INSTRUCTIONS, REWRITING])
@pytest.mark.parametrize("system", [False, True])
def test_of_one_turn_all_and_the_last_are_the_same(tokenizer, template, system):
    talk = [*[{"role": "system", "content": "be brief"}] * system, *TALK[:2]]
    all_turns, last = (
        responses(tokenizer, talk, which, chat_template=template)[0] for which in ("all", "last")
    )
    for name, value in vars(last).items():
        np.testing.assert_array_equal(getattr(all_turns, name), value)
    assert all_turns.scored is None


def test_tools_and_what_they_answer_are_read():
    tokenizer = TOKENIZERS["byte_level"]
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    talk = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3 pm"},
        {"role": "assistant", "content": "at 3"},
    ]
    template = "{{ tools | tojson }}" + CHATML
    for cut in (1, 3):  # the prompt has the call, or the response has
        rows, report = responses(tokenizer, talk, cut=cut, tools=[call], chat_template=template)
        called, said = scored_texts(tokenizer, rows)
        assert called.startswith("<tool_call>")
        assert '"CET"' in called
        assert called.endswith("</tool_call><|im_end|>")
        assert said == "at 3<|im_end|></s>"
        assert tokenizer.decode(rows.flat).startswith('[{"type": "function"')
        assert report.user_turns == 1
    last, _ = responses(tokenizer, talk, "last", cut=3, tools=[call], chat_template=template)
    np.testing.assert_array_equal(last.scored, rows.scored)


def test_pairs_score_the_assistants_turns_after_the_first_difference():
    tokenizer = TOKENIZERS["byte_level"]
    prompt, shared = turns("hello"), turns("hi there", "why?", first="assistant")
    chosen = shared + turns("because", "12?", "it is 42", first="assistant")
    rejected = shared + turns("no", "please!", "hello", "so?", "no way", first="assistant")
    pairs, report = pair(tokenizer, prompt, chosen, rejected, chat_template=CHATML)
    end = "<|im_end|>"
    assert scored_texts(tokenizer, pairs.rows, 0) == [f"because{end}", f"it is 42{end}</s>"]
    expected = [f"no{end}", f"hello{end}", f"no way{end}</s>"]
    assert scored_texts(tokenizer, pairs.rows, 1) == expected
    assert report.user_turns == 2
    lengths = [len(pairs.rows.scored_in(row)) for row in (0, 1)]
    assert pairs.response_length.tolist() == [lengths]
    assert pairs.rows.begin[0] == pairs.rows.begin[1]
    for row, side in enumerate((chosen, rejected)):
        text = tokenizer.apply_chat_template(prompt + side, chat_template=CHATML, tokenize=False)
        assert tokenizer.decode(pairs.rows[row]) == text.strip() + "</s>"


def test_a_turn_before_a_differing_question_is_not_scored():
    tokenizer = TOKENIZERS["byte_level"]
    chosen = turns("hi", "why?", "because", first="assistant")
    rejected = turns("hi", "who?", "no", first="assistant")
    pairs, _ = pair(tokenizer, turns("hello"), chosen, rejected, chat_template=CHATML)
    texts = [scored_texts(tokenizer, pairs.rows, row) for row in (0, 1)]
    assert texts == [["because<|im_end|></s>"], ["no<|im_end|></s>"]]


def test_one_side_may_have_more_turns():
    tokenizer = TOKENIZERS["byte_level"]
    chosen = turns("because", "12?", "it is 42", first="assistant")
    pairs, report = pair(
        tokenizer, turns("why?"), chosen, turns("no", first="assistant"), chat_template=CHATML
    )
    alone, _ = pair(
        tokenizer, turns("why?"), chosen[:1], turns("no", first="assistant"), chat_template=CHATML
    )
    assert report.user_turns == 1
    np.testing.assert_array_equal(pairs.rows[1], alone.rows[1])
    assert scored_texts(tokenizer, pairs.rows, 1) == ["no<|im_end|></s>"]


def test_truncation_ends_a_row_with_a_scored_token():
    tokenizer = TOKENIZERS["byte_level"]
    whole, _ = responses(tokenizer, TALK, chat_template=CHATML)
    scored = whole.scored_in(0)
    for length in range(20, len(whole.flat) + 1):
        rows, report = responses(
            tokenizer, TALK, chat_template=CHATML, max_length=length, min_prompt_length=10
        )
        assert rows.length[0] <= length
        assert rows.scored_in(0)[-1] == rows.length[0] - 1
        assert rows.length[0] - rows.prompt_length[0] == len(rows.scored_in(0))
        cut = report.truncated_prompts + report.truncated_responses
        assert (cut > 0) == (length < len(whole.flat))
        kept = scored[: len(rows.scored_in(0))]
        np.testing.assert_array_equal(rows.flat[rows.scored_in(0)], whole.flat[kept])


def test_a_pair_of_which_nothing_scored_is_left_is_counted():
    tokenizer = TOKENIZERS["byte_level"]
    chosen, rejected = (
        turns("hi", f"{ask} the lazy dog jumps over", say, first="assistant")
        for ask, say in (("why?", "because"), ("who?", "no"))
    )
    records = [
        PreferenceRecord(prompt=turns("x"), chosen=one, rejected=two, source="f", line=1)
        for one, two in ((chosen, rejected), (turns("a", first="assistant"), rejected[:1]))
    ]
    options = {
        "chat_template": "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    }
    pairs, report = tokenize_pairs(records, tokenizer, max_length=16, **options)
    assert (len(pairs), report.unscored) == (1, 1)
    assert pairs.record_index.tolist() == [1]
    assert "unscored: 1" in report.summary()


def test_what_reads_single_responses_says_so():
    tokenizer = TOKENIZERS["byte_level"]
    with pytest.raises(UserError, match="f:1: a response of several turns needs a decoder"):
        responses(tokenizer, TALK, chat_template=CHATML, encoder_decoder=True)
    rows, _ = responses(tokenizer, TALK, chat_template=CHATML)
    with pytest.raises(UserError, match=r"^a reader: reads responses of a single turn"):
        check_whole_responses(rows, "a reader")


def masked(pairs, seed=0):
    """Pairs some of whose response tokens are not scored; the last one is."""
    rng, rows = np.random.default_rng(seed), pairs.rows
    scored = np.zeros(len(rows.flat), bool)
    for begin, end, prompt in zip(
        rows.offsets[:-1], rows.offsets[1:], rows.prompt_length, strict=True
    ):
        scored[begin + prompt : end] = rng.random(end - begin - prompt) < 0.5
        scored[end - 1] = True
    counts = np.add.reduceat(scored.astype(int), rows.offsets[:-1])
    prompt_length = (rows.length - counts).astype(np.int32)
    return TokenizedPairs(
        rows=dataclasses.replace(rows, scored=scored, prompt_length=prompt_length)
    )


@pytest.mark.parametrize("form", [TokenizedPairs, TokenizedResponses])
def test_padded_and_packed_rows_score_the_same_tokens(form):
    examples = form(rows=masked(make_alike(21)).rows)
    examples.rows.record_index[:] = np.arange(len(examples.rows)) // form.sides
    seen = 0
    batches = packed_batches(examples, Packing(), batch_size=6, epochs=1)
    padded = {
        int(number): (batch, place)
        for batch in pair_batches(examples, batch_size=6, epochs=1)
        for place, number in enumerate(batch.record_index)
    }
    for batch in batches:
        packed = batch.packed
        for place, number in enumerate(batch.record_index.tolist()):
            for side in range(form.sides):
                row = form.sides * number + side
                scored = examples.rows.scored_in(row)
                size, whole = len(scored), examples.rows[row]
                other, at = padded[number]
                for one, here in ((batch, place), (other, at)):
                    assert one.response_length[here, side] == size
                    assert one.prompt_length[here, side] + size == len(whole)
                    tokens = one.response_tokens[here, side]
                    np.testing.assert_array_equal(tokens[:size], whole[scored])
                    assert not tokens[size:].any()
                    where = one.scored_positions[here, side, :size]
                    np.testing.assert_array_equal(where, scored - 1)
                of_row = packed.scored_start[place, side] + np.arange(size)
                np.testing.assert_array_equal(packed.scored_tokens[0, of_row], whole[scored])
                where = packed.scored_positions[0, of_row]
                np.testing.assert_array_equal(packed.positions[0, where], scored - 1)
                np.testing.assert_array_equal(packed.tokens[0, where], whole[scored - 1])
                seen += 1
    assert seen >= len(examples.rows)


def test_a_prompt_with_the_turns_of_another_row():
    rows = masked(make_alike(10)).rows
    data = LabelledRows(rows=rows, desirable=np.zeros(len(rows), bool))
    batches = labelled_batches(data, max_length=500, mismatched="all", batch_size=4, epochs=1)
    for batch in batches:
        own, other = batch.responses, batch.mismatched
        for place in range(4):
            size = int(other.response_length[place, 0])
            begin = int(own.scored_positions[place, 0, 0])
            assert other.scored_positions[place, 0, 0] == begin
            np.testing.assert_array_equal(
                other.tokens[place, 0, : begin + 1], own.tokens[place, 0, : begin + 1]
            )
            at = other.scored_positions[place, 0, :size] + 1
            np.testing.assert_array_equal(
                other.tokens[place, 0, at], other.response_tokens[place, 0, :size]
            )
            length = size + int(other.prompt_length[place, 0])
            assert at[-1] == length - 1


def test_the_real_template_of_smollm2():
    folder = Path(os.environ.get("JAXALIGN_REAL_WEIGHTS", ".")) / "smollm2"
    if not folder.is_dir():
        pytest.skip("smollm2 is not in JAXALIGN_REAL_WEIGHTS")
    tokenizer = load_tokenizer(folder)
    rows, _ = responses(tokenizer, TALK)
    said = [turn["content"] for turn in TALK[1::2]]
    assert scored_texts(tokenizer, rows) == [f"{text}<|im_end|>" for text in said]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(rows.flat) == text.strip()
    one, last = (responses(tokenizer, TALK[:2], which)[0] for which in ("all", "last"))
    np.testing.assert_array_equal(one.flat, last.flat)
    assert one.scored is last.scored is None
