"""Requests of the lm-evaluation-harness: the answers of its own Hugging Face model, stored."""

import json

import numpy as np
import pytest

from jaxalign.backends.local import LocalModel
from jaxalign.errors import UserError
from jaxalign.evaluation.harness_requests import (
    chat_text,
    decoding_of,
    encode_pairs,
    log_likelihoods,
    longest,
    responses,
    rolling_log_likelihoods,
    rolling_windows,
)
from tests.evaluation.local_tasks import FIXTURE, LONG, VARIANTS, write_model

EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: LocalModel.load(write_model(folder / name, name), batch_size=4, chat="never")
        for name in VARIANTS
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probs_and_greedy_flags_are_those_of_transformers(models, variant):
    expected = EXPECTED[variant]
    pairs = [tuple(pair) for pair in expected["pairs"]]
    found = log_likelihoods(models[variant], pairs)
    values, greedy = zip(*found, strict=True)
    own, flags = zip(*expected["log_likelihoods"], strict=True)
    np.testing.assert_allclose(values, own, rtol=1e-5, atol=1e-4)
    assert greedy == flags
    assert {True, False} == set(flags)


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_longer_than_the_context_are_those_of_transformers(models, variant):
    expected = EXPECTED[variant]
    found = rolling_log_likelihoods(models[variant], expected["texts"])
    np.testing.assert_allclose(found, expected["rolling"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", ["begun", pytest.param("plain", marks=pytest.mark.slow)])
def test_responses_are_those_of_transformers(models, variant):
    expected = EXPECTED[variant]
    requests = [tuple(one) for one in expected["contexts"]]
    found = responses(models[variant], requests)
    assert found == expected["responses"]
    half = len(found) // 2
    assert found[:half] != found[half:]  # the stop strings stop


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversations_are_those_of_transformers(models, variant):
    turns, (asked, going_on) = EXPECTED[variant]["turns"], EXPECTED[variant]["chat"]
    assert chat_text(models[variant], turns[:2]) == asked
    assert chat_text(models[variant], turns, add_generation_prompt=False) == going_on


def test_boundaries_of_context_and_continuation(models):
    model = models["begun"]
    begin, end = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    (context, own), (moved, spaced), (empty, _), (none, _) = encode_pairs(
        model, [("The sky is", " blue"), ("The sky is ", "blue"), ("", "The"), ("  ", "The")]
    )
    assert (moved, spaced) == (context, own)
    assert context[0] == begin
    assert model.tokenizer.decode(own) == " blue"
    assert empty == none == [begin]
    assert encode_pairs(models["plain"], [("", "The")])[0][0] == [end]


@pytest.mark.parametrize(("length", "most"), [(1, 4), (4, 4), (5, 4), (10, 4), (12, 4), (7, 1)])
def test_windows_predict_every_token_once_and_read_as_much_as_they_can(length, most):
    windows = list(rolling_windows(list(range(length)), -1, most))
    assert [token for _, own in windows for token in own] == list(range(length))
    assert windows[0][0] == [-1]
    for context, own in windows[1:]:
        assert len(context) + len(own) == most + 1  # the last token is not read
        assert [*context, *own] == list(range(context[0], own[-1] + 1))


def test_the_example_of_the_harness_has_its_windows():
    """Of the docstring of `lm_eval.api.model.LM.loglikelihood_rolling`."""
    assert list(rolling_windows(range(10), -1, 4)) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]


def test_samples_of_the_same_context_are_other_draws(models, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        models["begun"], "sample", lambda rows, numbers, _: drawn.append(numbers) or []
    )
    settings = {"max_gen_toks": 12, "temperature": 1.0}
    responses(models["begun"], [("The sky is", settings)] * 3 + [("The", settings)])
    [numbers] = drawn
    assert len({number for [number] in numbers}) == 4


def test_what_a_task_sets_is_how_it_samples():
    assert decoding_of({}).max_tokens == 256
    greedy = decoding_of({"until": "\n", "max_new_tokens": 5, "do_sample": False, "temperature": 1})
    assert (greedy.temperature, greedy.max_tokens, greedy.stop) == (0.0, 5, ("\n",))
    drawn = decoding_of({"temperature": 0.5, "top_p": 0.9, "until": ["", "."], "num_beams": 1})
    assert (drawn.temperature, drawn.top_p, drawn.stop) == (0.5, 0.9, (".",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "num_beams: only 1"),
        ({"do_sample": True}, "do_sample with temperature 0"),
        ({"guidance_scale": 2}, "guidance_scale: not supported"),
    ],
)
def test_settings_that_are_not_supported_are_named(settings, said):
    with pytest.raises(UserError, match=said):
        decoding_of(settings)


def test_what_cannot_be_asked_is_named(models):
    model = models["begun"]
    assert longest(model) == 64
    with pytest.raises(UserError, match="without a token"):
        log_likelihoods(model, [("The", "")])
    with pytest.raises(UserError, match="the model reads 64"):
        log_likelihoods(model, [("The", LONG)])
    with pytest.raises(UserError, match="leave no room for a context in the model's 64"):
        responses(model, [("The", {"max_gen_toks": 64})])


def test_a_template_without_system_turns_is_used_without_them(models, monkeypatch, capsys):
    model = models["begun"]
    template = (
        "{% for x in messages %}{% if x.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ x.content }}{% endfor %}"
    )
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert chat_text(model, turns) == "u"
    assert "refuses a system turn" in capsys.readouterr().err
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        chat_text(model, turns)
