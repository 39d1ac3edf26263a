"""Whether plain prompts go through a chat template: the rule, what is said, what a folder keeps."""

import copy

import pytest

from jaxalign.data import (
    PreferenceRecord,
    PromptRecord,
    embedded_tokenizer,
    load_tokenizer,
    tokenize_pairs,
    tokenize_prompts,
)
from jaxalign.data.plain_prompts import PlainPrompts, plain_prompts, with_choice
from jaxalign.data.records import shared_length
from jaxalign.errors import UserError, leave_notices_to, notice_once

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [("What is red?", "A ball.", "The sea."), ("Who ran?\n", "Tom", "No one ran.<|end|>")]


@pytest.fixture(autouse=True)
def _said_nothing_yet():
    notice_once.cache_clear()


def with_template(template=TEMPLATE):
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def pairs_of(tokenizer, **options):
    records = [
        PreferenceRecord(prompt=p, chosen=c, rejected=r, source="f", line=1) for p, c, r in PAIRS
    ]
    pairs, report = tokenize_pairs(records, tokenizer, max_length=200, **options)
    lengths = pairs.rows.prompt_length.tolist()
    rows = [pairs.rows[row].tolist() for row in range(len(pairs.rows))]
    return [(row[:n], row[n:]) for row, n in zip(rows, lengths, strict=True)], report


def test_a_chat_model_reads_plain_prompts_as_turns_and_says_so_once(capsys):
    """Token ids are those of transformers' own rendering."""
    tokenizer = with_template()
    for chat in ("auto", "always"):
        rows, report = pairs_of(tokenizer, chat=chat)
        sides = [(p, response) for p, *both in PAIRS for response in both]
        for (prompt, response), (asked, said) in zip(rows, sides, strict=True):
            turn = [{"role": "user", "content": asked}]
            begun = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            assert prompt == tokenizer(begun).input_ids
            end = "" if said.endswith("<|end|>") else "<|end|>"
            assert tokenizer.decode(response) in (said + end, said + "<|end|>")
        assert report.prompts_as_chat == len(PAIRS)
        assert len(report.chat) == (chat == "auto")
    line = "jaxalign: plain prompts go through the chat template, as a user's turn; --chat never"
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_conversations_alone_are_no_news(capsys):
    turns = [{"role": "user", "content": "What is red?"}]
    _, report = tokenize_prompts(
        [PromptRecord(prompt=turns, source="f", line=1)], with_template(), max_length=50
    )
    assert (report.prompts_as_chat, report.chat) == (0, [])
    assert capsys.readouterr().err == ""


def test_another_process_says_it(capsys, monkeypatch):
    monkeypatch.setattr("jaxalign.errors._ELSEWHERE", [])
    leave_notices_to("process 0")
    pairs_of(with_template())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("template", [None, "own"])
def test_without_a_template_and_with_this_project_s_own_text_stays_text(template, capsys):
    tokenizer = embedded_tokenizer()
    if template is None:
        tokenizer.chat_template = None
    rows, report = pairs_of(tokenizer)
    assert rows[0][0] == tokenizer("What is red?").input_ids
    assert (report.prompts_as_chat, report.chat) == (0, [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_never_gives_what_trl_trains_on(template):
    """The rows of TRL 1.16's `DPOTrainer` where they are not conversational.

    The end-of-sequence token behind each completion; the prompt, and prompt with completion,
    tokenised; cut where they diverge.
    """
    tokenizer = with_template(template)
    rows, _ = pairs_of(tokenizer, chat="never")
    for at, (prompt, *sides) in enumerate(PAIRS):
        eos = tokenizer.eos_token
        ended = [side if side.endswith(eos) else side + eos for side in sides]
        prompt_ids = tokenizer(prompt)["input_ids"]
        joint = [tokenizer(prompt + side)["input_ids"] for side in ended]
        length = min(shared_length(prompt_ids, one) for one in joint)
        assert rows[2 * at : 2 * at + 2] == [(prompt_ids[:length], one[length:]) for one in joint]


def test_the_rule_and_its_words(tmp_path):
    tokenizer, own = with_template(), embedded_tokenizer()
    layout = {"prompt_format": "Q: {prompt}"}
    found = plain_prompts(tokenizer, **layout)
    assert (found.as_turns, "in the given prompt_format; --chat always" in found.line) == (0, 1)
    found = plain_prompts(tokenizer, "always", **layout)
    assert (found.as_turns, "prompt_format is not read" in found.line) == (1, 1)
    assert plain_prompts(tokenizer, "always").line is None
    assert plain_prompts(tokenizer, "never", **layout).line is None
    assert plain_prompts(own, "always").as_turns
    assert plain_prompts(own, chat_template=TEMPLATE).as_turns
    named = with_template({"default": TEMPLATE, "rag": "x"})
    assert plain_prompts(named).as_turns
    named.chat_template = {"rag": "x", "b": "y"}
    found = plain_prompts(named)
    assert not found.as_turns
    assert "none of the chat templates b, rag is the default; --tokenizer FOLDER#" in found.line
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat: always, but the tokenizer has no chat template"):
        plain_prompts(tokenizer, "always")


@pytest.mark.parametrize("template", [TEMPLATE, "own"])
@pytest.mark.parametrize("as_turns", [True, False])
def test_a_folder_keeps_how_its_model_was_trained(tmp_path, template, as_turns):
    tokenizer = embedded_tokenizer() if template == "own" else with_template()
    before = copy.copy(tokenizer.init_kwargs)
    with_choice(tokenizer, PlainPrompts(as_turns=as_turns)).save_pretrained(tmp_path / "a")
    assert tokenizer.init_kwargs == before
    again = load_tokenizer(tmp_path / "a")
    assert again("What is red?").input_ids == tokenizer("What is red?").input_ids
    again.save_pretrained(tmp_path / "b")
    for name in "ab":
        found = plain_prompts(load_tokenizer(tmp_path / name))
        assert found.as_turns == as_turns
        silent = template == "own" and not as_turns
        assert (found.line is None) == silent
        assert silent or f"{tmp_path / name}: plain prompts " in found.line
        assert silent or "as it was trained; --chat " in found.line
    for chat, expected in (("always", True), ("never", False)):
        assert plain_prompts(again, chat).as_turns == expected


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_folder_keeps_the_format_of_plain_text_that_the_model_was_trained_in(
    template, tmp_path, capsys
):
    layout = "Q: {prompt}\nA: "
    tokenizer = with_template(template) if template else embedded_tokenizer()
    trained = plain_prompts(tokenizer, prompt_format=layout)
    with_choice(tokenizer, trained).save_pretrained(tmp_path / "a")
    kept = load_tokenizer(tmp_path / "a")
    rows, _ = pairs_of(kept)
    assert rows == pairs_of(tokenizer, prompt_format=layout)[0]
    assert "in 'Q: {prompt}\\nA: ', as it was trained" in capsys.readouterr().err
    assert pairs_of(kept, chat="never")[0] == pairs_of(tokenizer, chat="never")[0]
    other = pairs_of(kept, prompt_format="{prompt}?")[0]
    assert other == pairs_of(tokenizer, prompt_format="{prompt}?")[0]
    # trained on without the flag, it stays; in another format, that one is kept
    with_choice(kept, plain_prompts(kept)).save_pretrained(tmp_path / "b")
    assert plain_prompts(load_tokenizer(tmp_path / "b")).prompt_format == layout
    with_choice(kept, plain_prompts(kept, prompt_format="{prompt}?")).save_pretrained(
        tmp_path / "c"
    )
    assert plain_prompts(load_tokenizer(tmp_path / "c")).prompt_format == "{prompt}?"
    with_choice(kept, plain_prompts(kept, "never")).save_pretrained(tmp_path / "d")
    assert plain_prompts(load_tokenizer(tmp_path / "d")).prompt_format == "{prompt}"


def test_a_folder_keeps_that_responses_had_no_end_token(tmp_path):
    tokenizer = embedded_tokenizer()
    plain = plain_prompts(tokenizer)
    with_choice(tokenizer, plain, end_token=False).save_pretrained(tmp_path / "a")
    kept = load_tokenizer(tmp_path / "a")
    without = pairs_of(tokenizer, end_token=False)[0]
    assert pairs_of(kept)[0] == without != pairs_of(tokenizer)[0]
    assert pairs_of(kept, end_token=True)[0] == pairs_of(tokenizer)[0]
    with_choice(kept, plain, end_token=True).save_pretrained(tmp_path / "b")
    assert pairs_of(load_tokenizer(tmp_path / "b"))[0] == pairs_of(tokenizer)[0]
