"""Blocked log-probs against float64 NumPy written from the definition, and what they must keep."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy as scipy_entropy

from jaxalign.models import DecoderConfig
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import init_params, logits
from jaxalign.models.logprobs import token_kl, token_log_probs
from jaxalign.models.responses import response_log_probs, text_log_probs
from jaxalign.rows import ResponseRows
from tests.slow import mostly_slow

TOKENS, WIDTH = 13, 5
BLOCKS = [{}, {"token_block": 4, "vocab_block": 300}, {"token_block": 1, "vocab_block": 999}]
FORMS = {"plain": {}, "scale": {"scale": 0.4}, "softcap": {"softcap": 3.0, "scale": 1.7}}


def draw(rng, vocabulary, tokens=TOKENS, width=WIDTH):
    return {
        "hidden": rng.normal(size=(tokens, width)),
        "kernel": rng.normal(size=(width, vocabulary)),
        "bias": rng.normal(size=vocabulary),
        "targets": rng.integers(0, vocabulary, tokens),
    }


def as_float32(drawn):
    kinds = {"f": np.float32, "i": np.int32}
    return {name: jnp.asarray(x, kinds[x.dtype.kind]) for name, x in drawn.items()}


def dense_logits(hidden, kernel, bias, scale=None, softcap=None):
    """Logits and their derivative by u = hidden @ kernel + bias, in float64."""
    z = (hidden @ kernel + bias) * (scale or 1.0)
    if softcap is None:
        return z, np.full_like(z, scale or 1.0)
    tanh = np.tanh(z / softcap)
    return softcap * tanh, (1 - tanh**2) * (scale or 1.0)


def cotangents(drawn, d_u):
    return {
        "hidden": d_u @ drawn["kernel"].T,
        "kernel": drawn["hidden"].T @ d_u,
        "bias": d_u.sum(0),
    }


def assert_close(ours, expected, at=1e-5):
    for name, value in expected.items():
        size = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(ours[name] / size, value / size, atol=at, err_msg=name)


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    mostly_slow(
        itertools.product([1000, 32000, 32003, 50257], FORMS),
        quick=[(1000, "plain"), (32000, "scale"), (32003, "softcap")],
    ),
)
def test_values_and_gradients_are_the_dense_ones(rng, vocabulary, name):
    """By hand: d log p_t / d z = onehot - p, d H / d z = -p (log p + H)."""
    form = FORMS[name]
    drawn = draw(rng, vocabulary)
    by_log_prob, by_entropy = rng.normal(size=(2, TOKENS))
    z, slope = dense_logits(drawn["hidden"], drawn["kernel"], drawn["bias"], **form)
    log_p, rows = log_softmax(z, axis=-1), np.arange(TOKENS)
    p, entropy = np.exp(log_p), scipy_entropy(softmax(z, axis=-1), axis=-1)
    onehot = np.zeros_like(p)
    onehot[rows, drawn["targets"]] = 1
    d_z = by_log_prob[:, None] * (onehot - p)
    d_z -= by_entropy[:, None] * p * (log_p + entropy[:, None])

    inputs, sizes = as_float32(drawn), {"token_block": 5, "vocab_block": vocabulary // 3}

    def total(moved):
        out = token_log_probs(**(inputs | moved), **form, **sizes, entropy_gradient=True)
        return jnp.sum(out.log_prob * by_log_prob + out.entropy * by_entropy), out

    moved = {name: inputs[name] for name in ("hidden", "kernel", "bias")}
    gradient, out = jax.jit(jax.grad(total, has_aux=True))(moved)
    np.testing.assert_allclose(out.log_prob, log_p[rows, drawn["targets"]], atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(out.entropy, entropy, atol=1e-5, rtol=1e-6)
    assert_close(gradient, cotangents(drawn, d_z * slope))


@pytest.mark.parametrize(
    ("sizes", "tokens"),
    mostly_slow(
        itertools.product(BLOCKS, [1, 13, 16]),
        quick=[(BLOCKS[0], 13), (BLOCKS[1], 13), (BLOCKS[1], 16), (BLOCKS[2], 1)],
    ),
)
def test_blocks_change_nothing(rng, sizes, tokens):
    inputs = as_float32(draw(rng, 1003, tokens))
    weight = jnp.asarray(rng.normal(size=tokens), jnp.float32)

    def total(hidden, kernel, bias, **sizes):
        out = token_log_probs(hidden, kernel, inputs["targets"], bias=bias, **sizes)
        return jnp.sum(out.log_prob * weight), out

    arguments = inputs["hidden"], inputs["kernel"], inputs["bias"]
    whole = {"token_block": tokens, "vocab_block": 1003}
    expected, out = jax.grad(total, (0, 1, 2), has_aux=True)(*arguments, **whole)
    blocked, blocked_out = jax.grad(total, (0, 1, 2), has_aux=True)(*arguments, **sizes)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, (blocked, blocked_out), (expected, out))


def test_probabilities_of_all_targets_sum_to_one(rng):
    drawn = as_float32(draw(rng, 1003, tokens=1))
    every = jnp.broadcast_to(drawn["hidden"], (1003, WIDTH))
    out = token_log_probs(every, drawn["kernel"], jnp.arange(1003), bias=drawn["bias"])
    np.testing.assert_allclose(np.exp(np.float64(out.log_prob)).sum(), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "vocab_block"),
    mostly_slow(itertools.product(FORMS, [None, 300]), quick=[("plain", None), ("softcap", 300)]),
)
def test_the_log_probability_that_two_draws_agree(rng, name, vocab_block):
    """Log sum_v p_v^2 in float64; it changes no other value and no gradient flows through it."""
    form = FORMS[name]
    drawn = draw(rng, 1003)
    z, _ = dense_logits(drawn["hidden"], drawn["kernel"], drawn["bias"], **form)
    inputs = as_float32(drawn)

    def total(hidden):
        options = {"collision": True, "vocab_block": vocab_block, **form}
        out = token_log_probs(**(inputs | {"hidden": hidden}), **options)
        return out.collision.sum(), out

    gradient, out = jax.grad(total, has_aux=True)(inputs["hidden"])
    expected = np.log(np.square(softmax(z, axis=-1)).sum(-1))
    np.testing.assert_allclose(out.collision, expected, atol=1e-5, rtol=1e-5)
    plain = token_log_probs(**inputs, vocab_block=vocab_block, **form)
    np.testing.assert_array_equal(out.log_prob, plain.log_prob)
    np.testing.assert_array_equal(out.entropy, plain.entropy)
    assert plain.collision is None
    assert not gradient.any()


def test_uniform_logits_know_nothing():
    out = token_log_probs(jnp.zeros((2, 3)), jnp.ones((3, 5000)), jnp.array([0, 4999]))
    np.testing.assert_allclose(out.log_prob, -np.log(5000), rtol=1e-6)
    np.testing.assert_allclose(out.entropy, np.log(5000), rtol=1e-6)


def test_extreme_logits_stay_finite(rng):
    """A logit of 1e4 and one of -1e4 beside it: log-prob and gradient are exact, not NaN."""
    kernel = jnp.zeros((1, 3000)).at[0, 7].set(1.0).at[0, 2999].set(-1.0)

    def worst(hidden):
        return token_log_probs(
            hidden, kernel, jnp.array([2999]), token_block=1, vocab_block=512
        ).log_prob[0]

    value, slope = jax.value_and_grad(worst)(jnp.array([[1e4]]))
    np.testing.assert_allclose(value, -2e4, rtol=1e-6)
    np.testing.assert_allclose(slope, [[-2.0]], rtol=1e-6)


def test_entropy_is_a_constant_unless_asked(rng):
    drawn = as_float32(draw(rng, 1000))

    def entropy(hidden, asked):
        out = token_log_probs(hidden, drawn["kernel"], drawn["targets"], entropy_gradient=asked)
        return out.entropy.sum()

    assert not np.any(jax.grad(entropy)(drawn["hidden"], False))
    assert np.all(jax.grad(entropy)(drawn["hidden"], True))


def test_bfloat16_products_accumulate_in_float32(rng):
    """Rounding the inputs is the only loss: 1e-5 of the float64 value of the rounded inputs."""
    drawn = draw(rng, 32003, width=64)
    inputs = as_float32(drawn)
    inputs |= {name: inputs[name].astype(jnp.bfloat16) for name in ("hidden", "kernel")}
    rounded = [np.float64(inputs[name]) for name in ("hidden", "kernel")]
    out = token_log_probs(**inputs)
    z, _ = dense_logits(*rounded, np.float64(inputs["bias"]))
    expected = log_softmax(z, axis=-1)[np.arange(TOKENS), drawn["targets"]]
    assert out.log_prob.dtype == jnp.float32
    np.testing.assert_allclose(out.log_prob, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "vocabulary", "reverse"),
    mostly_slow(
        itertools.product(FORMS, [1000, 32003], [False, True]),
        quick=[("plain", 32003, False), ("scale", 1000, True), ("softcap", 1000, False)],
    ),
)
def test_divergence_is_scipys(rng, name, vocabulary, reverse):
    form = FORMS[name]
    policy, reference = draw(rng, vocabulary), draw(rng, vocabulary, width=3)
    weight = rng.normal(size=TOKENS)
    keys = ("hidden", "kernel", "bias")
    z, slope = dense_logits(*(policy[key] for key in keys), **form)
    z_r, _ = dense_logits(*(reference[key] for key in keys), **form)
    p, r = softmax(z, axis=-1), softmax(z_r, axis=-1)
    if reverse:
        expected, d_z = rel_entr(r, p).sum(-1), p - r
    else:
        expected = rel_entr(p, r).sum(-1)
        d_z = p * (np.log(p / r) - expected[:, None])
    policy32, reference32 = as_float32(policy), as_float32(reference)
    others = {f"reference_{key}": reference32[key] for key in keys}

    def total(moved, others):
        out = token_kl(**moved, **others, **form, reverse=reverse, token_block=4, vocab_block=700)
        return jnp.sum(out * weight), out

    moved = {key: policy32[key] for key in keys}
    (gradient, to_reference), out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(moved, others)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
    assert_close(gradient, cotangents(policy, weight[:, None] * d_z * slope))
    assert all(not np.any(x) for x in to_reference.values())


def test_divergence_from_oneself_is_zero(rng):
    drawn = as_float32(draw(rng, 5003))
    out = token_kl(*(drawn[name] for name in ("hidden", "kernel", "hidden", "kernel")))
    np.testing.assert_allclose(out, 0.0, atol=1e-6)


@pytest.mark.parametrize("value", ["log_prob", "kl"])
def test_no_array_of_logits_in_the_compiled_program(value):
    """Temporaries of forward and backward stay below 1/20 of [tokens, vocabulary] in float32."""
    tokens, width, vocabulary = 4096, 64, 32003
    shape = jax.ShapeDtypeStruct
    hidden, kernel = shape((tokens, width), jnp.float32), shape((width, vocabulary), jnp.float32)

    def total(hidden, kernel, targets, other):
        if value == "kl":
            return token_kl(hidden, kernel, *other).sum()
        return token_log_probs(hidden, kernel, targets).log_prob.sum()

    gradient = jax.jit(jax.grad(total, (0, 1)))
    compiled = gradient.lower(hidden, kernel, shape((tokens,), jnp.int32), (hidden, kernel))
    used = compiled.compile().memory_analysis().temp_size_in_bytes
    assert used < tokens * vocabulary * 4 / 20


@pytest.mark.parametrize("spec", [("data", None), ("data", "fsdp")])
def test_a_mesh_changes_nothing(rng, spec):
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    drawn = as_float32(draw(rng, 1003, tokens=64, width=8))

    def total(hidden, kernel, targets):
        return token_log_probs(
            hidden, kernel, targets, token_block=16, vocab_block=300
        ).log_prob.sum()

    gradient = jax.jit(jax.grad(total, (0, 1)))
    arguments = drawn["hidden"], drawn["kernel"], drawn["targets"]
    tokens_on, width_on = (NamedSharding(mesh, PartitionSpec(axis)) for axis in spec)
    placed = [
        jax.device_put(x, at)
        for x, at in zip(arguments, (tokens_on, width_on, tokens_on), strict=True)
    ]
    for ours, expected in zip(gradient(*placed), gradient(*arguments), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    # Tokens stay split: every matrix product of a block sees 16 / 4 tokens on a device.
    text = gradient.lower(*placed).compile().as_text()
    assert "f32[4,256]" in text
    assert "f32[16,256]" not in text


def test_vmapped_gradients_are_those_of_each_token(rng):
    drawn = as_float32(draw(rng, 1003, tokens=3))

    def log_prob(kernel, hidden, target):
        return token_log_probs(hidden[None], kernel, target[None], vocab_block=300).log_prob[0]

    gradient = jax.grad(log_prob)
    one_by_one = jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))
    each = one_by_one(drawn["kernel"], drawn["hidden"], drawn["targets"])
    for i in range(3):
        alone = gradient(drawn["kernel"], drawn["hidden"][i], drawn["targets"][i])
        np.testing.assert_allclose(each[i], alone, atol=1e-6)


@pytest.mark.parametrize("name", ["token_block", "vocab_block"])
def test_blocks_of_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: 0 is not positive"):
        token_log_probs(jnp.ones((1, 2)), jnp.ones((2, 9)), jnp.array([0]), **{name: 0})


CONFIG = DecoderConfig(
    vocab_size=101, width=16, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=24,
    context_length=64, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(params=[{}, {"logit_softcap": 2.0, "logit_scale": 0.5, "tied": True}])
def policy(request):
    config = dataclasses.replace(CONFIG, **request.param)
    return init_params(config, jax.random.key(0)), config


def dialogues(rng, vocabulary, batch=3, length=12, response=6):
    """Rows of prompt and response behind one another, and the same responses apart."""
    prompt_length, response_length = np.array([3, 1, 6]), np.array([4, 6, 1])
    tokens, responses = np.zeros((batch, length), int), np.zeros((batch, response), int)
    for row, (start, count) in enumerate(zip(prompt_length, response_length, strict=True)):
        tokens[row, : start + count] = rng.integers(1, vocabulary, start + count)
        responses[row, :count] = tokens[row, start : start + count]
    return ResponseRows(
        tokens=jnp.asarray(tokens),
        prompt_length=jnp.asarray(prompt_length),
        response_tokens=jnp.asarray(responses),
        response_length=jnp.asarray(response_length),
    )


def test_response_log_probs_are_those_of_the_logits(rng, policy):
    params, config = policy
    rows = dialogues(rng, config.vocab_size)
    tokens, responses = rows.tokens, rows.response_tokens
    out = response_log_probs(params, config, rows)
    log_p = log_softmax(np.float64(logits(params, config, tokens)), axis=-1)
    expected = np.zeros(responses.shape)
    entropy = np.zeros(responses.shape)
    for row in range(3):
        for i in range(int(rows.response_length[row])):
            place = int(rows.prompt_length[row]) + i
            expected[row, i] = log_p[row, place - 1, tokens[row, place]]
            entropy[row, i] = scipy_entropy(np.exp(log_p[row, place - 1]))
    np.testing.assert_allclose(out.log_prob, expected, atol=1e-5)
    np.testing.assert_allclose(out.entropy, entropy, atol=1e-5)
    assert np.all((np.asarray(out.log_prob) == 0) == (expected == 0))


def test_padding_of_a_response_has_no_gradient(rng, policy):
    params, config = policy
    rows = dialogues(rng, config.vocab_size)
    tokens, responses = rows.tokens, rows.response_tokens

    def total(params, tokens, responses):
        changed = dataclasses.replace(rows, tokens=tokens, response_tokens=responses)
        return response_log_probs(params, config, changed).log_prob.sum()

    other = jnp.where(responses == 0, 5, responses)
    real = jnp.arange(tokens.shape[1])[None] < (rows.prompt_length + rows.response_length)[:, None]
    gradient_of = jax.jit(jax.grad(total))
    gradient = gradient_of(params, tokens, responses)
    padded = gradient_of(params, jnp.where(real, tokens, 7), other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, padded)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_text_log_probs_of_packed_documents_are_those_of_each_alone(rng, policy):
    params, config = policy
    documents = [rng.integers(0, config.vocab_size, size) for size in (5, 1, 4)]
    tokens = np.concatenate([*documents, [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [5, 1, 4, 2])[None]
    positions = np.concatenate([np.arange(5), [0], np.arange(4), [0, 0]])[None]
    mask = np.ones_like(tokens)
    mask[0, 2] = 0
    arrays = [jnp.asarray(x) for x in (tokens, segments, positions, mask)]
    out = text_log_probs(params, config, *arrays)
    expected = []
    for document in documents:
        log_p = log_softmax(np.float64(logits(params, config, jnp.asarray(document)[None]))[0], -1)
        expected += [0.0, *log_p[np.arange(len(document) - 1), document[1:]]]
    expected = np.array([*expected, 0.0, 0.0])
    expected[2] = 0.0
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


def test_gradient_of_a_model_under_a_mesh(rng):
    """Eight rows over a data axis of four, parameters replicated: the gradient of one device."""
    params = init_params(CONFIG, jax.random.key(1))
    parts = [dialogues(rng, CONFIG.vocab_size) for _ in range(4)]
    batch = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)

    def total(params, batch):
        blocks = Compute(token_block=24, vocab_block=40)
        out = response_log_probs(params, CONFIG, batch, compute=blocks)
        return out.log_prob.sum()

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    gradient = jax.jit(jax.grad(total))
    ours = gradient(jax.device_put(params, everywhere), jax.device_put(batch, rows))
    expected = gradient(params, batch)
    jax.tree.map(  # sums of 8 rows in another order: elements are as large as 10
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, expected
    )
