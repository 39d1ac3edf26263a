"""Continuations that share a context: the log-probs and greedy tokens of whole rows of logits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.backends import scoring
from jaxalign.backends.scoring import row_length, score_continuations
from jaxalign.models import load_pretrained

FIXTURES = Path(__file__).parents[1] / "fixtures"
LENGTHS = [(7, 1), (7, 1), (7, 4), (7, 6), (3, 2), (9, 9), (9, 1), (12, 2)]
"""Tokens of context and continuation; those with equally long contexts have the same one."""


def pairs_of(model, rng):
    contexts = {size: rng.integers(3, model.config.vocab_size, size).tolist() for size in range(20)}
    return [
        (contexts[size], rng.integers(3, model.config.vocab_size, own).tolist())
        for size, own in LENGTHS
    ]


def logits_of(model, context, own):
    """The logits that predict a continuation, from one row with nothing else in it."""
    if hasattr(model.config, "decoder_layers"):
        inputs = jnp.asarray([[model.config.start_token, *own[:-1]]])
        return np.asarray(model(jnp.asarray([context]), decoder_tokens=inputs))[0]
    tokens = np.zeros((1, 20), np.int32)  # of one length, to compile once
    row = [*context, *own]
    tokens[0, : len(row)] = row
    return np.asarray(model(jnp.asarray(tokens)))[0, len(context) - 1 : len(row) - 1]


@pytest.mark.parametrize("case", ["models/gemma2", "models/gpt2", "encoder_decoders/t5_v1_1"])
def test_scores_are_those_of_each_row_by_itself(case, rng, monkeypatch):
    """With windows and caps, with learned positions, and with an encoder."""
    monkeypatch.setattr(scoring, "SHARED", 24)
    model = load_pretrained(FIXTURES / case)
    pairs = pairs_of(model, rng)
    context = pairs[-1][0]
    likely = int(np.argmax(logits_of(model, context, [3])[0]))
    pairs.append((context, [likely]))
    found = dict(score_continuations(model.params, model.config, pairs, batch_size=3))
    assert sorted(found) == list(range(len(pairs)))
    assert found[len(pairs) - 1].greedy
    for number, (context, own) in enumerate(pairs):
        logits = logits_of(model, context, own)
        log_probs = np.asarray(jax.nn.log_softmax(logits.astype(np.float64)))
        expected = sum(log_probs[at, token] for at, token in enumerate(own))
        assert found[number].log_prob == pytest.approx(expected, abs=2e-5, rel=1e-5)
        assert found[number].greedy == (np.argmax(logits, -1) == own).all()


def test_a_context_is_read_once_for_all_its_continuations():
    pairs = [([5, 6, 7], [1]), ([5, 6, 7], [1, 2, 3]), ([8], [4]), ([5, 6, 7], [9, 9])]
    rows = scoring._joined(pairs, None)
    assert [row.tokens for row in rows] == [[5, 6, 7, 1, 2, 9], [8]]
    assert rows[0].segments == [1, 1, 1, 3, 3, 4]
    assert rows[0].positions == [0, 1, 2, 3, 4, 3]
    assert rows[0].predicted_at == [2, 2, 3, 4, 2, 5]
    assert rows[0].targets == [1, 1, 2, 3, 9, 9]
    assert rows[0].members == [(0, 1), (1, 3), (3, 2)]


def test_rows_are_no_longer_than_the_context(monkeypatch):
    monkeypatch.setattr(scoring, "SHARED", 4)
    pairs = [([1, 2, 3], [4, 5])] * 6
    assert [len(row.tokens) for row in scoring._joined(pairs, None)] == [6, 6]
    assert [len(row.tokens) for row in scoring._joined(pairs, 5)] == [5, 5, 5]
    assert [len(row.tokens) for row in scoring._joined(pairs, 4)] == [4] * 6


def test_lengths_of_rows_are_few():
    lengths = {row_length(tokens, None) for tokens in range(1, 1000)}
    assert lengths == {32, 64, 128, 256, 512, 1024}
    assert row_length(70, 100) == 100


def test_an_empty_continuation_is_certain():
    model = load_pretrained(FIXTURES / "models" / "gpt2")
    [(_, score)] = score_continuations(model.params, model.config, [([1, 2], [])], batch_size=1)
    assert (score.log_prob, score.greedy) == (0.0, True)
