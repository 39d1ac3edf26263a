"""Steering vectors: their loss, their training on planted directions, their files and their use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import TokenizedPairs, pair_batches
from jaxalign.errors import UserError
from jaxalign.generation import Sampling, generate
from jaxalign.models.decoder import hidden_states, init_params, logits, states_at_layers
from jaxalign.models.decoder_layer import without_direction
from jaxalign.models.steering import (
    SteeringVector,
    parse_steering,
    read_steering,
    steered,
    write_steering,
)
from jaxalign.representation import (
    Reader,
    RepsOptions,
    means_difference,
    pair_log_probs,
    reps_loss,
    reps_losses,
    response_means,
    train_vector,
)
from jaxalign.representation.stimuli import joined_rows
from tests.representation.test_patterns import BASE, CONFIG, LAYER

KEY = jax.random.key(3)
OPTIONS = RepsOptions(steps=60, batch_size=8, learning_rate=0.2)


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def pairs_of(rows):
    """Pairs from (prompt, chosen, rejected) tokens."""
    flat = [np.array([*prompt, *side]) for prompt, *sides in rows for side in sides]
    lengths = [len(prompt) for prompt, *sides in rows for _ in sides]
    numbers = np.repeat(np.arange(len(rows)), 2)
    return TokenizedPairs(rows=joined_rows(flat, np.array(lengths), numbers))


def random_pairs(rng, number=6):
    def tokens(low, high):
        return rng.integers(1, 23, size=rng.integers(low, high)).tolist()

    return pairs_of([(tokens(2, 5), tokens(2, 6), tokens(2, 6)) for _ in range(number)])


def model_with(direction):
    """A tied model whose tokens 1 to 11 have a direction in their embeddings, and others minus it.

    To read these tokens moves the residual stream along the direction, and to move it along the
    direction makes these tokens likelier.
    """
    config = dataclasses.replace(CONFIG, tied=True, initializer_range=0.1)
    params = init_params(config, jax.random.key(7))
    sign = np.where(np.arange(23) < 12, 1.0, -1.0)[:, None]
    table = params["embed"]["embedding"] + jnp.asarray(sign * direction, jnp.float32)
    return config, {**params, "embed": {"embedding": table}}


def planted_pairs(rng, number=32):
    """Chosen responses of tokens with the direction, and rejected ones of tokens without."""

    def tokens(low, high):
        return rng.integers(low, high, size=rng.integers(4, 8)).tolist()

    prompt = [rng.integers(1, 23, size=3).tolist() for _ in range(number)]
    return pairs_of([(one, tokens(1, 12), tokens(12, 23)) for one in prompt])


# ------------------------------------------------------------------------ the intervention


def test_a_zero_vector_and_a_zero_factor_change_nothing(rng):
    tokens = jnp.asarray(rng.integers(1, 23, (2, 7)))
    plain = logits(BASE, CONFIG, tokens)
    zero = SteeringVector(layer=LAYER, vector=np.zeros(16, np.float32))
    some = SteeringVector(layer=LAYER, vector=np.ones(16, np.float32))
    for vector, factor in ((zero, 3.0), (some, 0.0), (zero, "null")):
        got = logits(steered(BASE, CONFIG, vector, factor), CONFIG, tokens)
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_steering_is_the_explicit_forward_with_the_vector_added(rng, layer):
    """The upper blocks, run as a model of their own on the shifted residual stream."""
    vector = rng.normal(size=16).astype(np.float32)
    tokens = jnp.asarray(rng.integers(1, 23, (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    below = states_at_layers(BASE, CONFIG, tokens, layers=(layer,), positions=positions)
    below = np.asarray(below[:, 0])
    steering = SteeringVector(layer=layer, vector=vector)
    square = float(vector @ vector)
    along = np.maximum(below @ vector, 0.0)[..., None]
    for factor, moved in ((1.7, below + 1.7 * vector), ("null", below - along * vector / square)):
        got = states_at_layers(
            steered(BASE, CONFIG, steering, factor),
            CONFIG,
            tokens,
            layers=(layer,),
            positions=positions,
        )[:, 0]
        np.testing.assert_allclose(got, moved, rtol=1e-4, atol=1e-5)
        expected = upper_blocks(moved, layer)
        params = steered(BASE, CONFIG, steering, factor)
        np.testing.assert_allclose(
            hidden_states(params, CONFIG, tokens), expected, rtol=1e-4, atol=1e-4
        )


def upper_blocks(states, layer):
    """The last hidden states from those of a layer: blocks that read embeddings of positions."""
    if layer == CONFIG.layers:
        rest, blocks = dataclasses.replace(CONFIG, layers=1), slice(0, 1)
        silent = jax.tree.map(lambda x: jnp.zeros_like(x[blocks]), BASE["layers"])
    else:
        rest = dataclasses.replace(CONFIG, layers=CONFIG.layers - layer)
        silent = jax.tree.map(lambda x: x[layer:], BASE["layers"])
    width, rows = states.shape[-1], states.shape[:2]
    table = jnp.asarray(states).reshape(-1, width)  # each position has an embedding of its own
    own = {**BASE, "layers": silent, "embed": {"embedding": table}}
    tokens = jnp.arange(len(table)).reshape(rows)
    return hidden_states(own, dataclasses.replace(rest, vocab_size=len(table)), tokens)


def test_removal_leaves_nothing_along_the_direction_and_the_opposite_side(rng):
    v, x = jnp.asarray(rng.normal(size=5)), jnp.asarray(rng.normal(size=(40, 5)))
    out, along = without_direction(x, v), x @ v
    np.testing.assert_allclose((out @ v)[along > 0], 0.0, atol=1e-5)
    np.testing.assert_array_equal(out[along < 0], x[along < 0])
    np.testing.assert_allclose(without_direction(x, 7.0 * v), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0.8, "null"])
def test_generation_is_steered_in_the_prompt_and_in_the_response(rng, factor):
    """Log-probs of the sampler's cache are those of a whole pass over the same tokens."""
    vector = SteeringVector(layer=LAYER, vector=rng.normal(size=16).astype(np.float32))
    params = steered(BASE, CONFIG, vector, factor)
    prompts, lengths = jnp.asarray(rng.integers(2, 23, size=(2, 4))), jnp.array([4, 4])
    out = generate([params], CONFIG, prompts, lengths, KEY, sampling=Sampling(max_tokens=5))
    tokens = jnp.concatenate([prompts, out.tokens], axis=1)
    own = jax.nn.log_softmax(logits(params, CONFIG, tokens))[:, 3:-1]
    expected = jnp.take_along_axis(own, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.log_prob, expected, atol=1e-4)
    plain = jax.nn.log_softmax(logits(BASE, CONFIG, tokens))[:, 3:-1]
    assert float(jnp.abs(own - plain).max()) > 1e-3


# ------------------------------------------------------------------------ the loss


def test_closed_forms_of_the_loss():
    plain = jnp.array([[-6.0, -4.0], [-4.0, -9.0]])
    lengths = jnp.array([[2, 4], [5, 3]])
    on, off = jnp.array([[-3.0, -8.0], [-5.0, -9.0]]), jnp.array([[-4.0, -2.0], [-6.0, -3.0]])

    def softplus(x):
        return np.log1p(np.exp(x))

    expected = [
        # beta+ = max(-4 + 6, 1) = 2 and beta- = 1; then 1 and max(-4 + 9, 1) = 5
        softplus(-(2 * -1.5 - -2.0)) + softplus(-(1 * -0.5 - -2.0)),
        softplus(-(1 * -1.0 - -3.0)) + softplus(-(5 * -1.0 - -1.2)),
    ]
    np.testing.assert_allclose(reps_loss(on, off, plain, lengths), expected, rtol=1e-6)


def test_exchanged_responses_and_sides_have_the_same_loss(rng):
    """The two margins are the same function, of responses and sides exchanged."""
    on, off, plain = (jnp.asarray(-9 * rng.random((5, 2))) for _ in range(3))
    lengths = jnp.asarray(rng.integers(1, 9, (5, 2)))
    exchanged = reps_loss(off[:, ::-1], on[:, ::-1], plain[:, ::-1], lengths[:, ::-1])
    np.testing.assert_allclose(reps_loss(on, off, plain, lengths), exchanged, rtol=1e-6)


@pytest.mark.parametrize("negative", ["null", "subtract"])
def test_the_gradient_is_that_of_finite_differences(rng, negative):
    pairs = random_pairs(rng)
    [batch] = pair_batches(pairs, batch_size=6, epochs=1, shuffle=False)
    batch = jax.tree.map(jnp.asarray, batch)
    plain = jnp.asarray(pair_log_probs(BASE, CONFIG, pairs))
    factors = jnp.asarray(rng.choice([0.5, 1.5], 6), jnp.float32)

    @jax.jit
    def loss(vector):
        options = {"layer": LAYER, "factors": factors, "negative": negative}
        return reps_losses(vector, BASE, CONFIG, batch, plain, **options).sum()

    at = jnp.asarray(rng.normal(size=16), jnp.float32)
    gradient, step = jax.grad(loss)(at), 2e-2
    assert float(jnp.abs(gradient).max()) > 0.01
    differences = [(loss(at + step * e) - loss(at - step * e)) / (2 * step) for e in jnp.eye(16)]
    np.testing.assert_allclose(gradient, differences, rtol=2e-2, atol=5e-3)


def test_factors_are_of_their_own_pairs(rng):
    pairs = random_pairs(rng, 3)
    [batch] = pair_batches(pairs, batch_size=3, epochs=1, shuffle=False)
    batch, plain = (
        jax.tree.map(jnp.asarray, batch),
        jnp.asarray(pair_log_probs(BASE, CONFIG, pairs)),
    )
    vector = jnp.asarray(rng.normal(size=16), jnp.float32)

    def losses(factors):
        own = jnp.asarray(factors, jnp.float32)
        return reps_losses(vector, BASE, CONFIG, batch, plain, layer=LAYER, factors=own)

    each = losses([0.0, 1.0, 2.0])
    for at, factor in enumerate((0.0, 1.0, 2.0)):
        np.testing.assert_allclose(each[at], losses([factor] * 3)[at], rtol=1e-5)


# ------------------------------------------------------------------------ the vectors


def test_means_are_those_of_the_response_tokens(rng):
    pairs = random_pairs(rng, 3)
    reader = Reader(config=CONFIG, layers=(1, LAYER))
    means = response_means(reader, BASE, pairs, batch_size=2)
    assert means.shape == (3, 2, 2, 16)
    for number in range(6):
        row, begin = pairs.rows[number], int(pairs.rows.prompt_length[number])
        positions = jnp.arange(begin, len(row))[None]
        states = states_at_layers(
            BASE, CONFIG, jnp.asarray(row)[None], layers=(1, LAYER), positions=positions
        )
        expected = states[0].mean(1)
        np.testing.assert_allclose(means[number // 2, number % 2], expected, rtol=1e-4, atol=1e-5)
    vector = means_difference(means[:, :, 1], LAYER)
    np.testing.assert_allclose(
        vector.vector, (means[:, 0, 1] - means[:, 1, 1]).mean(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("negative", ["null", "subtract"])
def test_means_and_reps_recover_a_planted_direction(rng, negative):
    direction = rng.normal(size=16)
    direction *= 0.5 / np.linalg.norm(direction)
    config, params = model_with(direction)
    seen, fresh = planted_pairs(rng), planted_pairs(rng)
    reader = Reader(config=config, layers=(LAYER,))
    means = means_difference(response_means(reader, params, seen)[:, :, 0], LAYER)
    options = dataclasses.replace(OPTIONS, negative=negative)
    trained, losses = train_vector(params, config, seen, means, options)
    assert cosine(means.vector, direction) > 0.85
    assert cosine(trained.vector, direction) > 0.6
    assert np.mean(losses[-20:]) < np.mean(losses[:20])

    def margin(factor, vector):
        values = pair_log_probs(steered(params, config, vector, factor), config, fresh)
        return float((values[:, 0] - values[:, 1]).mean())

    for vector in (means, trained):  # on pairs that are new, more along the direction, less against
        margins = [margin(factor, vector) for factor in (-1.0, 0.0, 1.0)]
        assert margins == sorted(margins)
        assert margin("null", vector) < margins[1]


def test_a_vector_without_a_difference_is_refused(rng):
    zero = SteeringVector(layer=LAYER, vector=np.zeros(16, np.float32))
    with pytest.raises(UserError, match="the responses do not differ"):
        train_vector(BASE, CONFIG, random_pairs(rng), zero)


# ------------------------------------------------------------------------ files


def test_vectors_come_back_from_their_files(tmp_path, rng):
    vector = rng.normal(size=16).astype(np.float32)
    made = {"method": "means", "pairs": 3}
    steering = SteeringVector(layer=2, vector=vector, provenance=made)
    path = tmp_path / "a" / "polite.safetensors"
    write_steering(steering, path)
    back = read_steering(path)
    np.testing.assert_array_equal(back.vector, vector)
    assert (back.layer, back.provenance, back.identity) == (2, made, steering.identity)
    assert parse_steering(str(path))[1] == 1.0
    assert parse_steering(f"{path}:-2.5")[1] == -2.5
    assert parse_steering(f"{path}:null")[1] == "null"
    with pytest.raises(UserError, match="'much' is not a factor"):
        parse_steering(f"{path}:much")
    with pytest.raises(UserError, match="no such file"):
        parse_steering(str(tmp_path / "b"))


def test_a_vector_of_another_model_is_refused():
    with pytest.raises(UserError, match="8 numbers, and the model a width of 16"):
        steered(BASE, CONFIG, SteeringVector(layer=1, vector=np.zeros(8, np.float32)))
    with pytest.raises(UserError, match="layer 5; the model's blocks end in layers 1 to 4"):
        steered(BASE, CONFIG, SteeringVector(layer=5, vector=np.zeros(16, np.float32)))
