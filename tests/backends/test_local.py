"""A model of a folder as a backend: texts against the tokens underneath."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.backends import Backend, Decoding
from jaxalign.backends.local import LocalModel
from jaxalign.errors import UserError
from jaxalign.models.decoder import logits
from jaxalign.sharding import make_mesh

PROMPTS = ["Once upon a time, there was a", "Tom had a red ball. He", "Lily saw a"]


@pytest.fixture(scope="module")
def model():
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("JAXALIGN_SHARED", root / ".." / "shared")) / "data"
    if not data.is_dir():
        pytest.skip(f"no real weights at {data} (set JAXALIGN_SHARED)")
    return LocalModel.load(data / "models" / "stories260K", batch_size=2)


pytestmark = pytest.mark.weights


def test_it_is_a_backend(model):
    assert isinstance(model, Backend)


def test_greedy_text_goes_on_the_prompt_as_the_logits_say(model):
    [[said]] = model.generate(PROMPTS[:1], Decoding(max_tokens=8))
    tokens = model.encode(PROMPTS[:1], 8)[0]
    begun = len(tokens)
    for _ in range(8):
        row = jnp.asarray([tokens], jnp.int32)
        scores = logits(model.model.params, model.model.config, row)
        tokens = [*tokens, int(np.argmax(np.asarray(scores)[0, -1]))]
    joint = model.tokenizer.decode(tokens, skip_special_tokens=True)
    assert joint == PROMPTS[0] + said.text
    assert said.tokens == len(tokens) - begun == 8
    assert not said.finished


def test_draws_depend_on_seed_and_prompt_alone(model):
    decoding = Decoding(max_tokens=6, temperature=1.0, seed=3)
    kept = {}
    whole = model.generate(PROMPTS, decoding, samples=2, keep=kept.__setitem__)
    assert model.generate(PROMPTS[::-1], decoding, samples=2) == whole[::-1]
    assert [first for [first] in model.generate(PROMPTS, decoding)] == [row[0] for row in whole]
    assert kept == dict(enumerate(whole))
    assert whole != model.generate(PROMPTS, Decoding(**vars(decoding) | {"seed": 4}), samples=2)
    assert whole[0][0] != whole[0][1]


def test_stops_end_a_text_and_are_no_part_of_it(model):
    [[free]] = model.generate(PROMPTS[:1], Decoding(max_tokens=12))
    stop = free.text[10:14]
    [[said]] = model.generate(PROMPTS[:1], Decoding(max_tokens=12, stop=(stop,)))
    assert said.text == free.text[: free.text.index(stop)]
    assert said.finished


def test_rules_of_the_draw_reach_the_sampler(model):
    """With one token to choose from, whatever is drawn is the greedy text."""
    [[greedy]] = model.generate(PROMPTS[:1], Decoding(max_tokens=8))
    for only in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        [[drawn]] = model.generate(PROMPTS[:1], Decoding(max_tokens=8, temperature=1.0, **only))
        assert drawn == greedy
    free = Decoding(max_tokens=40, repetition_penalty=50.0)
    [[varied]] = model.generate(PROMPTS[:1], free)
    tokens = model.tokenizer.encode(varied.text, add_special_tokens=False)
    assert len(set(tokens)) > 0.9 * len(tokens)


def test_scores_are_sums_of_log_softmax(model):
    continuations = [" little girl", " went to the park", " cat"]
    found = model.score(PROMPTS, continuations)
    for prompt, continuation, score in zip(PROMPTS, continuations, found, strict=True):
        begun = model.encode([prompt], 1)[0]
        whole = model.encode([prompt + continuation], 1)[0]
        assert whole[: len(begun)] == begun
        row = jnp.asarray([whole], jnp.int32)
        log_probs = jax.nn.log_softmax(logits(model.model.params, model.model.config, row))[0]
        each = [log_probs[at - 1, whole[at]] for at in range(len(begun), len(whole))]
        assert score.log_prob == pytest.approx(float(sum(each)), abs=1e-3)
        assert score.tokens == len(each)


def test_options_after_one_prompt_are_read_off_one_pass(model):
    options = [" a", " the", " to"]
    prompts = [text for text in PROMPTS for _ in options]
    found = model.score([*prompts, PROMPTS[0]], [*options * 3, " little girl"])
    alone = [model.score([p], [c])[0] for p, c in zip(prompts, options * 3, strict=True)]
    assert {score.tokens for score in found[:-1]} == {1}
    assert [score.log_prob for score in found[:-1]] == pytest.approx(
        [score.log_prob for score in alone], abs=1e-4
    )
    assert found[-1].tokens > 1


def test_vectors_do_not_depend_on_the_batch(model):
    found = model.embed(PROMPTS)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert found[2:] == pytest.approx(model.embed(PROMPTS[2:]), abs=1e-5)


def test_what_does_not_fit_is_named(model):
    with pytest.raises(UserError, match=r"file:2: the prompt is empty"):
        model.encode(["a", "  "], 4, ["file:1", "file:2"])
    long, short = model.score(["a cat " * 200, "a cat"], [" sat", " sat"])
    assert np.isnan(long.log_prob)
    assert np.isfinite(short.log_prob)
    with pytest.raises(UserError, match=r"prompt 1: 4 tokens.*600.*context of 512"):
        model.generate(["a cat"], Decoding(max_tokens=600))


def test_a_draft_changes_no_text(model):
    drafted = LocalModel(
        model.model, model.tokenizer, identity="drafted", batch_size=1, draft="prompt_lookup"
    )
    for rules in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        decoding = Decoding(max_tokens=24, **rules)
        plain = [model.generate([prompt], decoding)[0] for prompt in PROMPTS]
        assert drafted.generate(PROMPTS, decoding) == plain


def test_prompts_of_unlike_lengths_have_the_texts_that_they_have_alone(model):
    prompts = [*PROMPTS, PROMPTS[0] * 6, "a", PROMPTS[1] * 3]
    decoding = Decoding(max_tokens=12, temperature=0.9, stop=("the",))
    alone = [model.generate([prompt], decoding)[0] for prompt in prompts]
    assert model.generate(prompts, decoding) == alone
    assert len({one.tokens for [one] in alone}) > 1


def test_int8_weights_write_almost_the_same_texts(model):
    rounded = LocalModel(model.model, model.tokenizer, identity="same", weights="int8")
    assert rounded.identity.endswith(" int8")  # its answers are kept apart
    decoding = Decoding(max_tokens=24, temperature=0.0)
    found, exact = (
        [one.text for [one] in backend.generate(PROMPTS, decoding)] for backend in (rounded, model)
    )
    assert sum(mine[:20] == own[:20] for mine, own in zip(found, exact, strict=True)) >= 2
    assert rounded.score(PROMPTS[:1], [" cat"]) == model.score(PROMPTS[:1], [" cat"])


def test_int8_weights_are_refused_where_they_are_not_implemented(model):
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    with pytest.raises(UserError, match="one device"):
        LocalModel(model.model, model.tokenizer, identity="", mesh=mesh, weights="int8")


def test_another_template_or_end_is_another_identity(model):
    def identity(tokenizer, **options):
        return LocalModel(model.model, tokenizer, identity="", **options).identity

    other = copy.deepcopy(model.tokenizer)
    assert identity(other) == identity(model.tokenizer)
    other.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    known = {
        identity(model.tokenizer),
        identity(other, chat="never"),
        identity(model.tokenizer, end_tokens=[5]),
    }
    assert len(known) == 3
