"""The rules of the draw against their definitions written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.generation import Sampling, distribution, draw, mixture
from jaxalign.generation.sampling import most_likely


def by_definition(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after each rule in turn, token by token."""
    kept = set(range(len(logits)))

    def probabilities():
        values = {token: np.exp(logits[token] / temperature) for token in kept}
        total = sum(values.values())
        return {token: value / total for token, value in values.items()}

    ranked = sorted(kept, key=lambda token: -logits[token])
    if top_k:
        kept = set(ranked[:top_k])
    if top_p < 1:
        now, taken, mass = probabilities(), set(), 0.0
        for token in [token for token in ranked if token in kept]:
            if mass >= top_p:
                break
            taken.add(token)
            mass += now[token]
        kept = taken
    if min_p:
        now = probabilities()
        kept = {token for token in kept if now[token] >= min_p * max(now.values())}
    final = probabilities()
    return np.array([final.get(token, 0.0) for token in range(len(logits))])


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_p": 1e-6},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_the_rules_are_their_definitions(rng, rules):
    logits = rng.normal(size=(4, 40)) * 2
    found = jax.nn.softmax(distribution(jnp.asarray(logits, jnp.float32), Sampling(**rules)))
    expected = [by_definition(row, **rules) for row in logits]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_temperature_zero_is_the_likeliest_token(rng):
    logits = jnp.asarray(rng.normal(size=(4, 40)), jnp.float32)
    found = jax.nn.softmax(distribution(logits, Sampling(temperature=0.0)))
    np.testing.assert_array_equal(found, jax.nn.one_hot(logits.argmax(-1), 40))


@pytest.mark.parametrize("vocabulary", [3, 128, 300])
def test_the_likeliest_token_is_numpys_first_of_equals(rng, vocabulary):
    logits = rng.integers(-3, 3, size=(50, vocabulary)).astype(np.float32)  # many are equal
    logits[0] = -np.inf
    logits[0, -1] = -5.0
    found = most_likely(jnp.asarray(logits))
    np.testing.assert_array_equal(found, logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [3, 128, 300])
def test_draws_invert_the_distribution_function(rng, vocabulary):
    """Uniform numbers on a grid give every token its share of the grid."""
    logits = rng.normal(size=vocabulary) * 2
    shares = np.exp(logits) / np.exp(logits).sum()
    fine = (np.arange(256) + 0.5) / 256
    grid = np.stack(np.meshgrid(fine, fine, indexing="ij"), -1).reshape(-1, 2)
    rows = np.tile(np.float32(logits), (len(grid), 1))
    tokens, log_probs = draw(jnp.asarray(rows), jnp.asarray(grid, jnp.float32))
    counted = np.bincount(np.asarray(tokens), minlength=vocabulary) / len(grid)
    np.testing.assert_allclose(counted, shares, atol=3 / 256)
    np.testing.assert_allclose(log_probs, np.log(shares)[np.asarray(tokens)], atol=1e-5)


def test_tokens_that_are_cut_are_never_drawn(rng):
    logits = jnp.asarray(rng.normal(size=(2048, 50)), jnp.float32)
    kept = distribution(logits, Sampling(top_k=2))
    uniform = jax.random.uniform(jax.random.key(0), (2048, 2))
    uniform = uniform.at[:4].set(0.0).at[4:8].set(1 - 2**-24)
    tokens, _ = draw(kept, uniform)
    assert (jnp.take_along_axis(kept, tokens[:, None], axis=1) > -1e29).all()


def test_one_policy_alone_is_itself_and_two_are_their_weighted_sum(rng):
    one, other = (jnp.asarray(rng.normal(size=(2, 7)), jnp.float32) for _ in range(2))
    assert mixture([one], jnp.array([0.3])) is one
    weights = jnp.array([0.75, 0.25])
    shifted = mixture([one + 3.0, other - 5.0], weights)
    expected = jax.nn.log_softmax(0.75 * one + 0.25 * other)
    np.testing.assert_allclose(jax.nn.log_softmax(shifted), expected, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_impossible_rules_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
