"""Tokens of prompts and responses: those of the joint text, ended once, begun once, cut rightly."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from jaxalign.data import (
    embedded_preferences,
    embedded_tokenizer,
    load_tokenizer,
    preference_records,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_responses,
    tokenize_texts,
)
from jaxalign.data.records import (
    Conversation,
    PreferenceRecord,
    PromptRecord,
    PromptResponseRecord,
)
from jaxalign.data.tokenized import TokenizeReport
from jaxalign.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Question: why? Answer: because it can.",
    "What is 12 + 30? It is 42, of course; naïve café — ﬁne “quotes”.",
    "Human: say hello\n\nAssistant: hello there, how are you today?",
] * 20
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def byte_level():
    """GPT-2's kind: no beginning token, spaces belong to the word after them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def metaspace():
    """Llama's kind: a space is put before the text and <s> before that."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge over words
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL + alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram():
    """T5's kind: a space before the text, </s> after it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def wordpiece():
    """BERT's kind: lower case, spaces are in no token, [CLS] before and [SEP] after."""
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    marks = [(token, backend.token_to_id(token)) for token in special[1:]]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def tokenizers():
    return {make.__name__: make() for make in (byte_level, metaspace, unigram, wordpiece)}


KINDS = pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram", "wordpiece"])
PAIRS = [
    ("Question: why? Answer:", " because it can.", " it is 42"),
    ("What is 12 + 30?\n", "It is 42, of course", "naïve café"),
    ("", "The quick brown fox", "hello"),
    ("say hello\n\nAssistant:", " hello there", " how are you today? “quotes”"),
]


def record(prompt, chosen, rejected="x"):
    return PreferenceRecord(prompt=prompt, chosen=chosen, rejected=rejected, source="f", line=1)


def sides(tokenizer, prompt, chosen, rejected, **options):
    pairs, report = tokenize_pairs(
        [record(prompt, chosen, rejected)], tokenizer, **{"max_length": 200} | options
    )
    (lengths,) = pairs.prompt_length.tolist()
    rows = [pairs.rows[i].tolist() for i in (0, 1)]
    return [(row[:n], row[n:]) for row, n in zip(rows, lengths, strict=True)], report


def as_read(tokenizer, text_or_ids):
    """What a tokenizer reads in a text, spaces aside (WordPiece has none, and no capitals)."""
    if isinstance(text_or_ids, str):
        text_or_ids = tokenizer(text_or_ids, add_special_tokens=False).input_ids
    return "".join(tokenizer.decode(text_or_ids).split())


@KINDS
@pytest.mark.parametrize("pair", PAIRS)
def test_prompt_and_response_are_the_joint_texts_tokens(tokenizers, kind, pair):
    tokenizer = tokenizers[kind]
    prompt, *responses = pair
    rows, report = sides(tokenizer, *pair)
    eos = tokenizer.eos_token_id
    for (before, after), response in zip(rows, responses, strict=True):
        joint = tokenizer(prompt + response, add_special_tokens=True).input_ids
        joint = joint if joint[-1] == eos else [*joint, eos]
        if not prompt and joint[0] != tokenizer.bos_token_id:
            joint = [eos, *joint]  # something to predict the first token from
        assert before + after == joint
        # the response's tokens decode to the response, and to nothing else
        assert as_read(tokenizer, after[:-1]) == as_read(tokenizer, response)
    assert report.straddling == 0


@KINDS
@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab ?\né", max_size=8), response=st.text("ab c?é", min_size=1, max_size=8))
def test_no_character_is_lost_or_doubled(tokenizers, kind, prompt, response):
    tokenizer = tokenizers[kind]
    ((before, after), _), report = sides(tokenizer, prompt, response, "never the same")
    assert after[-1] == tokenizer.eos_token_id
    assert after.count(tokenizer.eos_token_id) == 1
    if kind == "byte_level" and before:  # the one kind that keeps every character
        start = before[1:] if not prompt else before
        assert tokenizer.decode(start + after[:-1]) == prompt + response
        if not report.straddling:
            assert tokenizer.decode(after[:-1]).endswith(response)


def test_a_token_across_the_boundary_is_counted_and_cut(tokenizers):
    tokenizer = tokenizers["byte_level"]
    (of,) = tokenizer(" of").input_ids  # one token, over the boundary of " o" and "f"
    prompt, response = " o", "f course"
    assert tokenizer(prompt + response).input_ids[0] == of
    ((before, after), _), report = sides(tokenizer, prompt, response, "other words")
    assert report.straddling >= 1
    assert before == tokenizer(prompt).input_ids
    assert tokenizer.decode(after[:-1]) == response


def test_begin_and_end_that_the_text_brings_along_stand_once(tokenizers):
    tokenizer = tokenizers["metaspace"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows, _ = sides(tokenizer, "<s>say", " hello</s>", " there")
    for before, after in rows:
        assert (before + after).count(bos) == 1
        assert before[0] == bos
        assert after.count(eos) == 1


def test_long_prompts_lose_their_beginning_and_are_counted(tokenizers):
    tokenizer = tokenizers["metaspace"]
    prompt = "The quick brown fox jumps over the lazy dog. " * 5
    rows, report = sides(tokenizer, prompt, " because", " it can, of course", max_length=40)
    whole = tokenizer(prompt).input_ids
    longest = max(len(after) for _, after in rows)
    for before, after in rows:
        assert len(before) + longest == 40  # both sides keep the same end of the prompt
        assert before[0] == tokenizer.bos_token_id
        assert before[1:] == whole[-len(before) + 1 :]
        assert after[-1] == tokenizer.eos_token_id
    assert (report.truncated_prompts, report.truncated_responses) == (2, 0)


def test_long_responses_lose_their_end_and_are_counted(tokenizers):
    tokenizer = tokenizers["byte_level"]
    prompt, long = "The quick brown fox jumps over", " the lazy dog" * 20
    rows, report = sides(tokenizer, prompt, long, " because", max_length=24, min_prompt_length=4)
    (before, after), (_, short) = rows
    assert before == tokenizer(prompt).input_ids[-4:]
    assert after == tokenizer(long).input_ids[:20]
    assert tokenizer.eos_token_id not in after
    assert short[-1] == tokenizer.eos_token_id
    assert (report.truncated_prompts, report.truncated_responses) == (2, 1)


def test_pairs_that_truncation_makes_the_same_are_left_out(tokenizers):
    tokenizer = tokenizers["byte_level"]
    long = " the lazy dog" * 20
    records = [record("say", long + " a", long + " b"), record("say", " a", " b")]
    pairs, report = tokenize_pairs(records, tokenizer, max_length=24)
    assert (len(pairs), report.records, report.identical) == (1, 2, 1)
    assert pairs.record_index.tolist() == [1]


def test_encoder_and_decoder_read_texts_of_their_own(tokenizers):
    tokenizer = tokenizers["unigram"]
    rows, _ = sides(tokenizer, "Question: why?", "because", "it can", encoder_decoder=True)
    for (before, after), response in zip(rows, ("because", "it can"), strict=True):
        assert before == tokenizer("Question: why?").input_ids  # with the end token T5 puts there
        assert after == tokenizer(response).input_ids


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def test_conversations_are_what_the_chat_template_makes_of_them(tokenizers):
    tokenizer = tokenizers["metaspace"]
    prompt = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "why?"},
    ]
    answer = [{"role": "assistant", "content": "because it can"}]
    other = [{"role": "assistant", "content": "of course"}]
    rows, report = sides(tokenizer, prompt, answer, other, chat_template=TEMPLATE)
    whole = tokenizer.apply_chat_template(
        prompt + answer, chat_template=TEMPLATE, tokenize=True, return_dict=False
    )
    begun = tokenizer.apply_chat_template(
        prompt, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    (before, after), _ = rows
    eos = tokenizer.eos_token_id
    last = len(whole) - whole[::-1].index(eos)  # the newline after the last turn is not scored
    assert before + after == whole[:last]
    assert before == tokenizer(begun, add_special_tokens=False).input_ids
    assert before.count(tokenizer.bos_token_id) == 1
    assert report.template_differs == 0


CHATML = (  # Qwen's
    "{% if messages[0].role != 'system' %}<|im_start|>system\nbe good<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # Llama 3's
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ (m.content or m.tool_calls | tojson) | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INSTRUCTIONS = (  # Mistral's, which has no prompt of its own for the answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} "
    "{{ m.content or m.tool_calls | tojson }}</s>{% else %}"
    "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say hello, why?"}]
CALLED = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3 pm"},
]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("it can, of course", "hello")]


@KINDS
@pytest.mark.parametrize(
    "template", [CHATML, HEADERS, INSTRUCTIONS], ids=["chatml", "head", "inst"]
)
@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        (ASKED, ANSWERS),
        (ASKED[1:], ANSWERS),
        (ASKED + CALLED, ANSWERS),
        (ASKED, [CALLED[:1], ANSWERS[0]]),  # one response is a call of a tool
        (ASKED, [CALLED + ANSWERS[0], CALLED + ANSWERS[1]]),  # a response of several turns
    ],
    ids=["system", "user", "tool", "call", "turns"],
)
def test_templates_give_the_tokens_that_transformers_gives(
    tokenizers, kind, template, prompt, answers
):
    tokenizer = tokenizers[kind]
    rows, report = sides(tokenizer, prompt, *answers, max_length=1000, chat_template=template)
    assert (report.template_differs, report.truncated_prompts) == (0, 0)
    prefix = tokenizer("").input_ids[:1] if kind in ("metaspace", "wordpiece") else []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    common = CALLED if answers[0][0] == answers[1][0] else []  # not scored: part of the prompt
    for (before, after), answer in zip(rows, answers, strict=True):
        whole = tokenizer.apply_chat_template(
            prompt + answer, chat_template=template, tokenize=True, return_dict=False
        )
        text = tokenizer.apply_chat_template(
            prompt + common, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        if template == CHATML:  # the line's end after the last turn's end is not scored
            told = tokenizer.apply_chat_template(
                prompt + answer, chat_template=template, tokenize=False
            )
            whole = tokenizer(told.rstrip(), add_special_tokens=False).input_ids
        whole = whole if whole[: len(prefix)] == prefix else prefix + whole
        whole = whole if whole[-1] == eos else [*whole, eos]
        if report.straddling == 0:
            assert before + after == whole
        assert as_read(tokenizer, before[len(prefix) :]).endswith(as_read(tokenizer, text[-9:]))
        # Mistral's template ends every turn of an answer with the end token
        ends_turns = template == INSTRUCTIONS and tokenizer.eos_token == "</s>"
        turns = sum(turn["role"] == "assistant" for turn in answer[len(common) :])
        assert after.count(eos) == (turns if ends_turns else 1)
        assert after[-1] == eos
        assert bos is None or (before + after).count(bos) == 1


def test_a_template_that_rewrites_the_prompt_is_counted(tokenizers):
    """Some leave out old thoughts once there is an answer: the prompt is what stands before it."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content | upper }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizers["byte_level"]
    rows, report = sides(tokenizer, ASKED[1:], *ANSWERS, chat_template=template)
    assert report.template_differs == 2
    assert tokenizer.decode(rows[0][0]) == "user: SAY HELLO, WHY?\nassistant: "
    assert tokenizer.decode(rows[0][1][:-1]) == "it can, of course\n"


THINKING = (  # DeepSeek's: the generation prompt opens a thought that finished turns lack
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "response", ["<table>yes</table>", "<think>\nhm</think>yes", "<think>", "No way", "<", "Yes"]
)
def test_the_boundary_does_not_depend_on_what_a_response_says(tokenizers, response):
    tokenizer = tokenizers["byte_level"]
    answers = [[{"role": "assistant", "content": text}] for text in (response, "of course")]
    rows, report = sides(tokenizer, ASKED[1:], *answers, chat_template=THINKING)
    begun = "[user]say hello, why?</s>[assistant]"
    for (before, after), text in zip(rows, (response, "of course"), strict=True):
        assert (tokenizer.decode(before), tokenizer.decode(after)) == (begun, f"{text}</s>")
    assert report.template_differs == 2


@given(texts=st.lists(st.text("Y N<think>\n o", min_size=1, max_size=9), min_size=2, max_size=2))
@settings(max_examples=60, deadline=None)
def test_both_rows_of_a_pair_have_the_same_prompt_tokens(tokenizers, texts):
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    for kind in ("byte_level", "metaspace"):
        for template in (THINKING, CHATML, INSTRUCTIONS, TEMPLATE):
            pair = [record(ASKED[1:], *answers)]
            if texts[0].strip() == texts[1].strip():
                continue
            pairs, _ = tokenize_pairs(
                pair, tokenizers[kind], max_length=500, chat_template=template
            )
            (lengths,) = pairs.prompt_length.tolist()
            rows = [pairs.rows[i][: lengths[i]].tolist() for i in (0, 1)]
            assert rows[0] == rows[1]


def test_one_response_across_the_boundary_takes_both_apart(tokenizers):
    """A word over the boundary is one token: the rival must not see another prompt."""
    tokenizer = tokenizers["byte_level"]
    rows, report = sides(tokenizer, "say o", "f course", " why")
    assert rows[0][0] == rows[1][0] == tokenizer("say o").input_ids
    assert report.straddling >= 1


def test_a_prompt_that_depends_on_the_response_is_refused(tokenizers):
    tokenizer = tokenizers["byte_level"]
    each = "{% for m in messages %}{{ m.content }}{% endfor %}"
    counting = "{{ messages[-1].content | length }}" + each
    with pytest.raises(UserError, match=r"f:1: the chat template renders no common text"):
        sides(tokenizer, ASKED[1:], *ANSWERS, chat_template=counting)
    politely = "{{ 'Listen: ' if messages[-1].content == 'hello' }}" + each
    with pytest.raises(UserError, match=r"f:1: the chat template renders the prompt differently"):
        sides(tokenizer, ASKED[1:], *ANSWERS, chat_template=politely)
    other = [ANSWERS[0], [{"role": "model", "content": "hello"}]]
    with pytest.raises(UserError, match=r"f:1: the chat template renders another prompt"):
        sides(tokenizer, ASKED[1:], *other, chat_template=THINKING)


def test_turns_of_a_user_in_a_response_are_counted(tokenizers):
    long = [*ANSWERS[0], {"role": "user", "content": "why?"}, *ANSWERS[1]]
    tokenizer = tokenizers["byte_level"]
    _, report = sides(tokenizer, ASKED, long, ANSWERS[1], max_length=500, chat_template=CHATML)
    assert report.user_turns == 1
    assert "user turns: 1" in report.summary()


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def test_tools_and_system_reach_the_template(tokenizers):
    tokenizer = tokenizers["byte_level"]
    template = "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}" + THINKING
    prompt = Conversation(ASKED, tools=TOOLS)
    rows, report = sides(tokenizer, prompt, *ANSWERS, max_length=500, chat_template=template)
    begun = f"TOOLS{json.dumps(TOOLS)}[system]be brief</s>[user]say hello, why?</s>[assistant]"
    assert tokenizer.decode(rows[0][0]) == begun
    assert report.notes == []


def test_what_a_template_does_not_read_and_what_it_misses_is_said_once(tokenizers):
    tokenizer = tokenizers["byte_level"]
    prompt = Conversation(ASKED, tools=TOOLS)
    thoughts = [ANSWERS[0][0] | {"reasoning_content": "hm"}]
    template = "{{ date }}{% if deep is defined %}{{ deep }}{% endif %}" + THINKING
    records = [record(prompt, thoughts, ANSWERS[1])] * 3
    _, report = tokenize_pairs(records, tokenizer, max_length=200, chat_template=template)
    assert report.summary().endswith(
        "; not read by the chat template: reasoning_content, tools"
        "; read by the chat template, but not set: date"
    )
    # beside plain text no template is asked
    plain = Conversation(ASKED, tools=TOOLS, text="say hello, why?")
    rows, report = sides(tokenizer, plain, " it can", " no")
    assert tokenizer.decode(rows[0][0]) == "say hello, why?"
    assert report.notes == ["not read by the chat template: system, tools"]


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_of_named_templates_transformers_choice_applies(tokenizers, tools):
    tokenizer = copy.copy(tokenizers["byte_level"])
    named = {"default": CHATML, "tool_use": "T" + THINKING, "rag": "R" + THINKING}
    tokenizer.chat_template = named
    prompt = Conversation(ASKED, tools=tools)
    options = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": True}
    rows, _ = tokenize_prompts(
        [PromptRecord(prompt=prompt, source="f", line=1)], tokenizer, max_length=200
    )
    assert tokenizer.decode(rows[0]) == tokenizer.apply_chat_template(ASKED, **options)
    options["chat_template"] = "rag"
    rows, _ = tokenize_prompts(
        [PromptRecord(prompt=prompt, source="f", line=1)],
        tokenizer,
        max_length=200,
        chat_template="rag",
    )
    assert tokenizer.decode(rows[0]) == tokenizer.apply_chat_template(ASKED, **options)
    tokenizer.chat_template = {"rag": THINKING}
    with pytest.raises(UserError, match='named rag, none of them "default"'):
        sides(tokenizer, ASKED, *ANSWERS)


def test_a_character_of_several_tokens_is_not_cut(tokenizers):
    tokenizer = tokenizers["byte_level"]
    assert len(tokenizer("\N{SNOWMAN}").input_ids) > 1
    rows, report = sides(tokenizer, "a\N{SNOWMAN}", "\N{SNOWMAN}b", "\N{OGHAM LETTER BEITH}")
    assert tokenizer.decode(rows[0][0]) == "a\N{SNOWMAN}"
    assert tokenizer.decode(rows[0][1][:-1]) == "\N{SNOWMAN}b"
    assert report.straddling == 0


def test_a_conversation_without_a_template_is_named(tokenizers):
    turn = [{"role": "user", "content": "x"}]
    with pytest.raises(UserError, match="f:1: a conversation, but the tokenizer has no chat"):
        sides(tokenizers["unigram"], turn, turn, turn)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="f:1: the chat template refuses it: roles must alternate"):
        sides(tokenizers["unigram"], turn, turn, turn, chat_template=refusing)


def test_plain_prompts_take_a_format_or_the_template(tokenizers):
    tokenizer = tokenizers["byte_level"]
    formatted, _ = sides(tokenizer, "why?", " it can", " x", prompt_format="Q: {prompt}\nA:")
    written, _ = sides(tokenizer, "Q: why?\nA:", " it can", " x")
    assert formatted == written
    open_ended, _ = sides(tokenizer, "Q: why?\nA:", " it can", " x", end_token=False)
    assert open_ended == [(prompt, response[:-1]) for prompt, response in written]
    options = {"chat_template": TEMPLATE, "chat": "always"}
    chat, _ = sides(tokenizer, "why?", "it can", "x", **options)
    turns, _ = sides(
        tokenizer,
        [{"role": "user", "content": "why?"}],
        [{"role": "assistant", "content": "it can"}],
        [{"role": "assistant", "content": "x"}],
        chat_template=TEMPLATE,
    )
    assert chat == turns
    with pytest.raises(UserError, match="prompt_format"):
        sides(tokenizer, "a", "b", "c", prompt_format="Q: prompt")


def test_responses_are_the_chosen_sides_of_pairs(tokenizers):
    tokenizer = tokenizers["metaspace"]
    records = [
        PromptResponseRecord(prompt=p, response=c, source="f", line=i)
        for i, (p, c, _) in enumerate(PAIRS)
    ]
    rows, _ = tokenize_responses(records, tokenizer, max_length=200)
    pairs, _ = tokenize_pairs([record(*pair) for pair in PAIRS], tokenizer, max_length=200)
    for i in range(len(PAIRS)):
        assert rows[i].tolist() == pairs.rows[2 * i].tolist()
    assert rows.prompt_length.tolist() == pairs.prompt_length[:, 0].tolist()


@KINDS
def test_documents_begin_and_end_and_are_kept_in_a_cache(tokenizers, kind, tmp_path):
    tokenizer = tokenizers[kind]
    texts = TEXTS[:3]
    tokens = tokenize_texts(texts, tokenizer, cache=tmp_path / "tokens")
    eos = tokenizer.eos_token_id
    start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for i, text in enumerate(texts):
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert tokens[i].tolist() == [start, *plain, eos]
    assert tokens.characters == sum(map(len, texts))
    (file,) = (tmp_path / "tokens").iterdir()
    again = tokenize_texts(texts, tokenizer, cache=tmp_path / "tokens")
    np.testing.assert_array_equal(again.flat, tokens.flat)
    tokenize_texts(texts[:2], tokenizer, cache=tmp_path / "tokens")
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert file.suffix == ".npz"


def test_embedded_pairs_are_whole(tokenizers):
    pairs, report = tokenize_pairs(embedded_preferences(200), embedded_tokenizer(), max_length=128)
    assert (len(pairs), report.truncated_prompts, report.straddling) == (200, 0, 0)


def test_a_tokenizer_is_written_as_it_was_read(tmp_path):
    """A finished run exports again when it is resumed: the same files, on which others may rest."""
    embedded_tokenizer().save_pretrained(tmp_path / "first")
    load_tokenizer(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes(), file.name


def test_tokenizers_that_cannot_serve_are_refused(tmp_path, tokenizers):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    backend = tokenizers["byte_level"].backend_tokenizer
    nameless = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(UserError, match="no end-of-sequence token; name eos_token"):
        sides(nameless, "a", "b", "c")
    with pytest.raises(UserError, match="leaves no room"):
        sides(tokenizers["byte_level"], "a", "b", "c", max_length=1)


def test_one_of_several_templates_is_named_with_the_tokenizer(tmp_path, tokenizers):
    tokenizer = copy.copy(tokenizers["byte_level"])
    tokenizer.chat_template = {"default": CHATML, "rag": THINKING}
    tokenizer.save_pretrained(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").chat_template == tokenizer.chat_template
    assert load_tokenizer(f"{tmp_path / 't'}#rag").chat_template == THINKING
    with pytest.raises(UserError, match="no chat template 'no'; it has default, rag"):
        load_tokenizer(f"{tmp_path / 't'}#no")
    (tmp_path / "t").rename(tmp_path / "a#b")  # a folder's name may hold the mark
    assert load_tokenizer(tmp_path / "a#b").chat_template == tokenizer.chat_template


REAL = ["tokenizers/gpt2", "tokenizers/minimind", "models/stories260K", "models/babyllama105"]
SETS = [
    "harmless-base-test.jsonl.gz",
    "imdb_same_movie_train.jsonl",
    "llamafactory_dpo_en.jsonl",
    "model_written_evals.jsonl",
    "rasbt_instruction_preference.jsonl",
    "truthfulqa_pairs.jsonl",
    "ultrafeedback_train.jsonl",
]


loaded = functools.cache(load_tokenizer)


@pytest.fixture(params=REAL)
def real_tokenizer(request, shared):
    return loaded(shared / request.param)


@pytest.mark.weights
@pytest.mark.parametrize("name", SETS)
def test_real_tokenizers_keep_the_joint_text_of_real_records(shared, real_tokenizer, name):
    tokenizer = real_tokenizer
    records = list(
        preference_records(f"{shared / 'preferences' / name}#[:100]", bad_records="skip")
    )
    pairs, report = tokenize_pairs(records, tokenizer, max_length=1_000_000, chat="never")
    assert len(pairs) == len(records) > 50
    assert (report.truncated_prompts, report.truncated_responses) == (0, 0)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [(r.prompt, response) for r in records for response in (r.chosen, r.rejected)]
    joint = tokenizer([prompt + response for prompt, response in texts]).input_ids
    apart = 0
    for i, (prompt, response) in enumerate(texts):
        row, whole = pairs.rows[i].tolist(), joint[i]
        apart += row != (whole if whole[-1] == eos else [*whole, eos])
        assert row[1:].count(bos) == (bos == eos)
        assert row.count(eos) == 1
        if tokenizer.unk_token_id == eos or tokenizer.unk_token_id not in row:
            cut = pairs.rows.prompt_length[i]
            for part, text in ((row[:cut], prompt), (row[cut:], response)):
                assert tokenizer.decode(part, skip_special_tokens=True).split() == text.split()
    assert apart == report.straddling  # only where one token lies across the boundary
    assert report.straddling <= 0.05 * 2 * len(records)


@pytest.mark.weights
def test_a_real_chat_template_with_tools_gives_transformers_tokens(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind")
    for prompt in (ASKED, ASKED + CALLED):
        rows, report = sides(tokenizer, prompt, *ANSWERS, max_length=1000)
        assert report.template_differs == 0
        for (before, after), answer in zip(rows, ANSWERS, strict=True):
            whole = tokenizer.apply_chat_template(prompt + answer, tokenize=True, return_dict=False)
            last = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
            assert before + after == whole[:last]
            assert before == tokenizer.apply_chat_template(
                prompt, tokenize=True, add_generation_prompt=True, return_dict=False
            )


@pytest.mark.weights
def test_a_folder_of_spiece_model_alone_is_read_as_sentencepiece_reads_it(shared):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared / "tokenizers" / "t5"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = load_tokenizer(folder)
    for prompt, *responses in PAIRS[1:2] + PAIRS[3:]:
        rows, _ = sides(tokenizer, prompt, *responses, encoder_decoder=True)
        for (before, after), response in zip(rows, responses, strict=True):
            assert before == [*processor.encode(prompt), 1]
            assert after == [*processor.encode(response), 1]


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)


def instructed(number, role="user"):
    turns = [{"role": role, "content": f"Say {number}."}, {"role": "user", "content": "Please."}]
    sides = {"chosen": f"It is {number}.", "rejected": "No."}
    return PreferenceRecord(prompt=turns, source="s.jsonl", line=number + 1, **sides)


def test_records_that_the_template_refuses_stop_or_are_counted():
    records = [instructed(n, "system" if n in (0, 2) else "user") for n in range(4)]
    options = {"max_length": 96, "chat_template": NO_SYSTEM + CHATML}
    tokenizer = byte_level()
    with pytest.raises(UserError, match=r"s\.jsonl:1: .* refuses it: no system turn"):
        tokenize_pairs(records, tokenizer, **options)
    pairs, report = tokenize_pairs(records, tokenizer, bad_records="skip", **options)
    usable, expected = tokenize_pairs([records[1], records[3]], tokenizer, **options)
    assert pairs.record_index.tolist() == [1, 3]
    assert pairs.rows.flat.tolist() == usable.rows.flat.tolist()
    assert (report.records, report.refused, report.tokens) == (4, 2, expected.tokens)
    assert "refused: 2 (as s.jsonl:1: " in report.summary()
    responses = [
        PromptResponseRecord(prompt=x.prompt, response=x.chosen, source=x.source, line=x.line)
        for x in records
    ]
    rows, report = tokenize_responses(responses, tokenizer, bad_records="skip", **options)
    assert rows.record_index.tolist() == [1, 3]
    assert (report.records, report.refused) == (4, 2)
    for tokenize, own in ((tokenize_pairs, records[:1]), (tokenize_responses, responses[:1])):
        with pytest.raises(UserError, match=r"1 records.*refused: 1 \(as s\.jsonl:1"):
            tokenize(own, tokenizer, bad_records="skip", **options)
        plain = byte_level()
        plain.chat_template = None
        with pytest.raises(UserError, match="the tokenizer has no chat template"):  # of no record
            tokenize(own, plain, bad_records="skip", max_length=96)


def test_reports_of_parts_keep_the_first_refusal():
    report = TokenizeReport()
    for refusals in ([], ["f:9000: no"], ["f:10000: no"]):
        report.add(TokenizeReport(records=2, refused=len(refusals), refusals=refusals))
    assert (report.records, report.refused, report.refusals) == (6, 2, ["f:9000: no"])


def test_refused_prompts_are_not_counted_as_rendered():
    system = Conversation([{"role": "system", "content": "s"}], text="Say 1.")
    records = [dataclasses.replace(instructed(n), prompt=x) for n, x in enumerate([system, "Say."])]
    options = {"max_length": 96, "chat_template": NO_SYSTEM + CHATML, "chat": "always"}
    _, report = tokenize_pairs(records, byte_level(), bad_records="skip", **options)
    assert (report.refused, report.prompts_as_chat) == (1, 1)
