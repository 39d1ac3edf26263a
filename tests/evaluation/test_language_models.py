"""A language model as judge: its label probabilities are those of its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import embedded_tokenizer, load_tokenizer
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, make_annotator
from jaxalign.evaluation.language_models import language_model, question_tokens
from jaxalign.models import encoder_decoder, save_pretrained
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.models.encoder_decoder import EncoderDecoder
from tests.tiny_model import save_tiny_model

PROMPTS = ["Say it.", "Why?", "Say it.", "Count to three."]
FIRST = ["The cat is here.", "Because.", "Same.", "one two three"]
SECOND = ["No.", "It rains all day, and all night too.", "Same.", "three two one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    save_tiny_model(path, context_length=400)
    return path


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("{prompt} 1: {first} 2: {second} Better:")
    return path


def test_probabilities_are_those_of_the_logits(folder, template):
    """F from whole-sequence logits of one row at a time, without padding or batches."""
    judge = language_model(str(folder), template=template, batch_size=3)
    for answer in judge.answers(PROMPTS, FIRST, SECOND):
        question = judge.template.fill(*(x[answer.number] for x in (PROMPTS, FIRST, SECOND)))
        (tokens, _), *_ = question_tokens(
            judge.tokenizer, [question], judge.labels[0], encoder_decoder=False, chat=judge.chat
        )
        scores = np.asarray(judge.model(jnp.asarray([tokens])), np.float64)[0, -1]
        both = scores[list(judge.label_tokens)]
        expected = np.exp(both[0]) / np.exp(both).sum()
        assert answer.preference == pytest.approx(expected, abs=1e-5)


def test_orders_are_averaged_and_batches_make_no_difference(folder, template):
    found = [
        make_annotator(
            f"lm:{folder}", AnnotatorOptions(template=template, batch_size=size)
        ).preferences(PROMPTS, FIRST, SECOND)
        for size in (1, 8)
    ]
    np.testing.assert_allclose(found[0].preference, found[1].preference, atol=1e-6)
    assert found[0].preference[2] == 0.5
    assert np.isnan(found[0].by_order[2]).all()
    swapped = make_annotator(
        f"lm:{folder}", AnnotatorOptions(template=template, batch_size=8)
    ).preferences(PROMPTS, SECOND, FIRST)
    np.testing.assert_allclose(swapped.preference, 1 - found[1].preference, atol=1e-6)


def test_a_model_with_a_chat_template_can_be_asked_in_plain_text(folder):
    """A question in plain text is what a tokenizer without a template gives."""
    turns, plain = (language_model(str(folder), chat=chat) for chat in ("auto", "never"))
    assert (turns.chat, plain.chat) == (True, False)
    assert turns.identity != plain.identity
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    found = language_model(str(folder), tokenizer=str(folder / "plain"))
    assert (found.template, found.labels) == (plain.template, plain.labels)
    with pytest.raises(UserError, match="chat: always, but the tokenizer has no chat template"):
        language_model(str(folder), tokenizer=str(folder / "plain"), chat="always")


def test_questions_beyond_the_length_have_no_verdict(folder, template):
    options = AnnotatorOptions(template=template, max_length=40, batch_size=2)
    annotator = make_annotator(f"lm:{folder}", options)
    verdicts = annotator.preferences(["p", "p"], ["a", "word " * 60], ["b", "c"])
    assert np.isfinite(verdicts.preference[0])
    assert verdicts.failures == {"the question is longer than 40 tokens": 1}


def test_a_label_that_becomes_another_token_has_no_verdict(folder, template, monkeypatch):
    from jaxalign.evaluation import language_models

    judge = language_model(str(folder), template=template, batch_size=2)
    monkeypatch.setattr(language_models, "question_tokens", lambda *_, **__: [([1, 2], -7)])
    [answer] = judge.answers(["p"], ["a"], ["b"])
    assert np.isnan(answer.preference)
    assert answer.reason == "after this question the label is another token"


def test_labels_that_are_one_token_to_the_tokenizer_are_refused(folder, tmp_path, monkeypatch):
    from jaxalign.evaluation import language_models

    monkeypatch.setattr(language_models, "NAMES", ("first answer", "second answer"))
    with pytest.raises(UserError, match="not two single tokens"):
        language_model(str(folder))
    monkeypatch.setattr(language_models, "NAMES", ("A", "A"))
    with pytest.raises(UserError, match="not two single tokens"):
        language_model(str(folder))


def test_templates_and_lengths_that_cannot_be(folder, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("{prompt} {first}")
    with pytest.raises(UserError, match=r"bad.txt does not hold \{second\}"):
        language_model(str(folder), template=bad)
    with pytest.raises(UserError, match="context of 400"):
        language_model(str(folder), max_length=400)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["stories260K", "babyllama105"])
def test_real_tokenizers_have_labels(shared, name):
    """Both have no token for a space and A: the label then stands after a space or a line break."""
    annotator = make_annotator(f"lm:{shared / 'models' / name}")
    verdicts = annotator.preferences(["Tell me."], ["A cat sat."], ["dog"])
    if name == "stories260K":
        assert 0 < verdicts.preference[0] < 1
    else:  # its question is longer than 254 characters
        assert verdicts.failures.total() == 1


def test_an_encoder_decoder_judges_too(tmp_path):
    """The label is the decoder's first token after its start token."""
    tokenizer = embedded_tokenizer()
    config = EncoderDecoderConfig(
        vocab_size=len(tokenizer),
        width=16,
        layers=2,
        decoder_layers=2,
        heads=2,
        head_width=8,
        mlp_width=24,
    )
    model = EncoderDecoder(config, encoder_decoder.init_params(config, jax.random.key(1)))
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    judge = language_model(str(tmp_path), batch_size=2)
    question = judge.template.fill("p", "a", "b")
    (tokens, _), *_ = question_tokens(tokenizer, [question], "A", encoder_decoder=True, chat=False)
    start = jnp.asarray([[config.start_token]])
    logits = judge.model(jnp.asarray([tokens]), decoder_tokens=start)
    both = np.asarray(logits, np.float64)[0, -1][list(judge.label_tokens)]
    (answer,) = judge.answers(["p"], ["a"], ["b"])
    assert answer.preference == pytest.approx(np.exp(both[0]) / np.exp(both).sum(), abs=1e-5)
