"""What the responses to a prompt do to each other, against their gradients one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data import PairBatch
from jaxalign.entanglement import PairGeometry, groups, pair_geometry
from jaxalign.entanglement.geometry import group_geometry
from jaxalign.entanglement.groups import GroupGeometry
from jaxalign.models import decoder, devices, logprobs, probes
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.models.responses import response_log_probs
from tests.entanglement.test_probing import FORMS, TIED_FORMS, small
from tests.slow import mostly_slow

jitted = jax.jit(decoder.init_params, static_argnums=0)


def group_batch(*, prompts=2, samples=3, prompt=4, response=5, seed=0):
    """Random responses of several lengths, with repeated tokens, and a coefficient per token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, (prompts, samples, prompt + response)).astype(np.int32)
    tokens[:, 1:, :prompt] = tokens[:, :1, :prompt]
    lengths = rng.integers(2, response + 1, (prompts, samples)).astype(np.int32)
    tokens[:, :, prompt:] *= np.arange(response) < lengths[..., None]
    batch = PairBatch(
        tokens=jnp.asarray(tokens),
        prompt_length=jnp.full((prompts, samples), prompt, jnp.int32),
        response_tokens=jnp.asarray(tokens[:, :, prompt:]),
        response_length=jnp.asarray(lengths),
        record_index=jnp.arange(prompts),
        weight=jnp.ones(prompts),
    )
    return batch, rng.normal(size=(prompts, samples, response))


def one_by_one(params, config, batch, coefficients, policy=lambda params: params):
    """Path of each parameter's node -> K and M from whole gradients of tokens, in float64."""

    def log_probs(params):
        out = response_log_probs(policy(params), config, batch.rows())
        return out.log_prob.reshape(batch.response_tokens.shape)

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.jacrev(log_probs))(params)):
        names = [entry.key for entry in path[:-1]]
        layers = leaf.shape[3] if "layers" in names else 1
        own = np.asarray(leaf, np.float64).reshape(*leaf.shape[:3], layers, -1)
        found.setdefault("/".join(names), []).append(own)
    whole = {}
    for path, parts in found.items():
        own = np.concatenate(parts, axis=-1)
        g, u = own.sum(2), np.einsum("pst,pstld->psld", coefficients, own)
        whole[path] = tuple(np.einsum("pild,pjld->plij", g, x) for x in (g, u))
    whole[""] = tuple(sum(x[at].sum(1, keepdims=True) for x in whole.values()) for at in (0, 1))
    return whole


def check(found, wanted, tolerance):
    assert set(found) == set(wanted)
    for path, (gradients, effects) in wanted.items():
        for value, own in ((found[path].gradients, gradients), (found[path].effects, effects)):
            layers = value if value.ndim == 4 else value[:, None]
            np.testing.assert_allclose(
                layers, own, rtol=tolerance, atol=tolerance * np.abs(own).max(), err_msg=path
            )


@pytest.mark.parametrize(
    ("form", "tied"),
    mostly_slow(itertools.product(FORMS, [True, False]), quick=TIED_FORMS.items()),
)
def test_every_form_and_every_part(form, tied, monkeypatch):
    formed, one = FORMS[form]
    for module in (probes, logprobs):
        monkeypatch.setattr(module, "forms_gradients", lambda *_: formed)
    monkeypatch.setattr(devices, "is_single_cpu", lambda: one)
    config, (batch, coefficients) = small(tied), group_batch()
    params = jitted(config, jax.random.key(0))
    weights = jnp.asarray(coefficients, jnp.float32)
    found = jax.jit(lambda p: group_geometry(p, config, batch, weights))(params)
    check(found, one_by_one(params, config, batch, coefficients), 2e-5)


@pytest.mark.parametrize("formed", [True, False], ids=["formed", "products"])
def test_in_float64_the_numbers_are_those_of_whole_gradients(formed, monkeypatch):
    """Models compute in float32; here what they call float32 is float64."""
    for module in (probes, logprobs):
        monkeypatch.setattr(module, "forms_gradients", lambda *_: formed)
    config = small(True)
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        params = jax.tree.map(
            lambda x: x.astype(jnp.float64), decoder.init_params(config, jax.random.key(0))
        )
        batch, coefficients = group_batch(samples=4)
        weights = jnp.asarray(coefficients)
        found = jax.jit(lambda p: group_geometry(p, config, batch, weights))(params)
        assert found[""].effects.dtype == np.float64
        check(found, one_by_one(params, config, batch, coefficients), 1e-9)


def test_adapters():
    config, (batch, coefficients) = small(True), group_batch()
    base = jitted(config, jax.random.key(0))
    adapters = init_adapters(base, jax.random.key(3), rank=2, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    found = jax.jit(
        lambda a: group_geometry(
            base, config, batch, jnp.asarray(coefficients), adapters=a, adapter_scale=0.5
        )
    )(adapters)
    wanted = one_by_one(
        adapters, config, batch, coefficients, lambda a: with_adapters(base, a, 0.5)
    )
    check(found, wanted, 2e-5)


def test_permuting_the_responses_permutes_the_matrices():
    config, (batch, coefficients) = small(True), group_batch(samples=4)
    params, order = jitted(config, jax.random.key(0)), np.array([2, 0, 3, 1])
    fields = ("tokens", "prompt_length", "response_tokens", "response_length")
    moved = {name: getattr(batch, name)[:, order] for name in fields}
    run = jax.jit(lambda b, c: group_geometry(params, config, b, c)[""])
    first = run(batch, jnp.asarray(coefficients))
    other = run(
        PairBatch(**moved, record_index=batch.record_index, weight=batch.weight),
        jnp.asarray(coefficients[:, order]),
    )
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        scale = 1e-5 * np.abs(one).max()
        np.testing.assert_allclose(one[:, order][:, :, order], two, rtol=1e-5, atol=scale)


def test_two_responses_are_a_pair():
    config, (batch, _) = small(True), group_batch(samples=2)
    params = jitted(config, jax.random.key(0))
    pair: PairGeometry = jax.jit(lambda p: pair_geometry(p, config, batch))(params)
    d_w, d_l = np.array([0.3, 0.7]), np.array([0.5, 0.2])
    coefficients = jnp.asarray(np.stack([d_w, -d_l], 1)[..., None] * np.ones(5))
    found = jax.jit(lambda p: group_geometry(p, config, batch, coefficients)[""])(params)
    np.testing.assert_allclose(found.gradients[:, 0, 0], pair.chosen, rtol=1e-5)
    np.testing.assert_allclose(found.gradients[:, 0, 1], pair.inner, rtol=1e-4)
    np.testing.assert_allclose(found.effects[:, 0, 0], d_w * pair.chosen, rtol=1e-5)
    np.testing.assert_allclose(found.effects[:, 0, 1], -d_l * pair.inner, rtol=1e-4)
    np.testing.assert_allclose(found.effects[:, 1, 0], d_w * pair.inner, rtol=1e-4)
    np.testing.assert_allclose(found.effects[:, 1, 1], -d_l * pair.rejected, rtol=1e-5)


def mean(counted):
    values, counts = (np.asarray(x, np.float64) for x in counted)
    total = np.sum(np.where(counts > 0, values, 0) * counts)
    return total / counts.sum() if counts.any() else float("nan")


def test_the_summary_of_a_group_by_hand():
    gradients = jnp.array([[[4.0, 2.0, 0.0], [2.0, 9.0, 3.0], [0.0, 3.0, 1.0]]])
    effects = jnp.array([[[1.0, 0.5, -2.0], [0.25, 2.0, -0.5], [0.5, 0.5, -0.25]]])
    geometry = GroupGeometry(gradients=gradients, effects=effects)
    advantage = jnp.array([[1.0, 2.0, -3.0]])
    found = {name: mean(x) for name, x in groups.summary(geometry, advantage).items()}
    assert found == pytest.approx(
        {
            "positive": 2 / 3,
            "negative": 1 / 3,
            "positive/predicted": (-0.5 + 1.75) / 2,
            "positive/own": 1.5,
            "positive/from_positive": (0.5 + 0.25) / 2,
            "positive/from_negative": (-2.0 - 0.5) / 2,
            "positive/norm": (2 + 3) / 2,
            "negative/predicted": 0.75,
            "negative/own": -0.25,
            "negative/from_positive": 1.0,
            "negative/from_negative": 0.0,
            "negative/norm": 1.0,
            "displaced": 1 / 2,
            "displaced_by_negative": 1 / 2,
            "lifted": 1.0,
            "cosine_positive": 2 / 6,
            "cosine_negative": float("nan"),
            "cosine_between": (0 + 3 / 3) / 2,
        },
        nan_ok=True,
    )
    realised = jnp.array([[-0.1, -0.1, 0.3]])
    numbers = groups.summary(geometry, advantage, realised)
    assert mean(numbers["agreement"]) == pytest.approx(2 / 3)
    assert mean(numbers["negative/realised"]) == pytest.approx(0.3)


def test_a_response_without_an_advantage_has_no_sign():
    geometry = GroupGeometry(gradients=jnp.ones((1, 2, 2)), effects=jnp.ones((1, 2, 2)))
    numbers = groups.summary(geometry, jnp.zeros((1, 2)))
    assert not any(np.any(counts) for name, (_, counts) in numbers.items() if "/" in name)
    assert mean(numbers["positive"]) == 0
