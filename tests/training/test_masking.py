"""Masked objectives: sums of the kept tokens, whatever the loss; learned weights and penalty."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.entanglement.masks import differing_tokens, initial_head
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models.decoder import init_params
from jaxalign.sharding import make_mesh, place
from jaxalign.training.masking import HEAD, MaskedPreferenceObjective, whole_responses
from jaxalign.training.objectives import Policy, ReferencedBatch, as_pairs
from jaxalign.training.optimizers import make_optimizer, with_rule
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.training.test_step import CONFIG, assert_trees_close, make_batch


@pytest.fixture
def world(rng):
    params = init_params(CONFIG, jax.random.key(1))
    frozen = {"policy": None, "reference": init_params(CONFIG, jax.random.key(2))}
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    return params, frozen, ReferencedBatch(pairs=batch, reference=None)


def masked(name, penalty=0.0):
    policy, loss = Policy(config=CONFIG), PREFERENCE_LOSSES[name]
    return MaskedPreferenceObjective(policy=policy, loss=loss, options={}, penalty=penalty)


@pytest.mark.parametrize("name", ["dpo", "cpo"])
def test_the_differing_tokens_alone_are_trained_and_watched(world, name):
    params, frozen, batch = world
    objective, real = masked(name), batch.pairs.weight > 0
    mask = differing_tokens(batch.pairs.response_tokens, batch.pairs.response_length)
    assert 0 < mask.sum() < batch.pairs.response_length.sum()

    def sums(params):
        return (mask * objective.policy.log_probs(batch.pairs, params).log_prob).sum(-1)

    def loss(params):
        pairs = as_pairs(sums(params), sums(frozen["reference"]), batch.pairs)
        return jnp.sum(PREFERENCE_LOSSES[name](pairs) * batch.pairs.weight) / real.sum()

    run = partial(gradients, objective, backward=PairProbe(objective=objective))
    grads, metrics, seen = jax.jit(run)(params, frozen, batch, jax.random.key(0))
    assert_trees_close(grads, jax.jit(jax.grad(loss))(params), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value(), loss(params), rtol=1e-5)
    share = (mask.sum(-1) / batch.pairs.response_length)[:-1, 0].mean()
    np.testing.assert_allclose(metrics["mask/chosen"].value(), share, rtol=1e-5)

    rows = jax.jit(jax.jacrev(lambda p: sums(p)[0]))(params)
    flat = jnp.concatenate([x.reshape(2, -1) for x in jax.tree.leaves(rows)], axis=1)
    expected = flat @ flat.T
    np.testing.assert_allclose(seen.geometry.inner[0], expected[0, 1], rtol=1e-4)
    np.testing.assert_allclose(seen.geometry.rejected[0], expected[1, 1], rtol=1e-4)

    whole = objective.policy.log_probs(batch.pairs, params).log_prob.sum(-1)[:-1, 0].mean()
    np.testing.assert_allclose(metrics["logps/chosen"].value(), whole, rtol=1e-5)
    plain = whole_responses(objective)
    assert not isinstance(plain, MaskedPreferenceObjective)
    assert plain.loss is objective.loss


@pytest.mark.parametrize("parts", [1, 2])
def test_a_learned_mask_has_the_gradient_of_loss_and_penalty(world, parts):
    params, frozen, batch = world
    head = initial_head(CONFIG.width, CONFIG.vocab_size)
    head = jax.tree.map(lambda x: x + 0.1, head)
    objective, key = masked("dpo", penalty=0.05), jax.random.key(0)
    trained = {**params, HEAD: head}
    run = jax.jit(partial(gradients, objective, micro_batches=parts))
    grads, _, _ = run(trained, frozen, batch, key)

    @jax.jit
    def loss(offset, token):
        moved = {**head, "offset": head["offset"] + offset}
        moved["token"] = moved["token"].at[3].add(token)
        outputs = objective.forward({**params, HEAD: moved}, frozen, batch, None)
        return objective.reduce(outputs, batch, objective.count(batch))[0]

    eps = 1e-2
    by_offset = (loss(eps, 0.0) - loss(-eps, 0.0)) / (2 * eps)
    by_token = (loss(0.0, eps) - loss(0.0, -eps)) / (2 * eps)
    np.testing.assert_allclose(grads[HEAD]["offset"], by_offset, rtol=1e-2)
    np.testing.assert_allclose(grads[HEAD]["token"][3], by_token, rtol=2e-2, atol=1e-4)


def test_a_large_penalty_empties_the_mask_and_leaves_the_rest_to_its_own_rule(world):
    params, frozen, batch = jax.device_get(world)
    objective = masked("dpo", penalty=10.0)
    mesh = make_mesh(data=4, fsdp=2)
    optimizer = with_rule(HEAD, 1.0, make_optimizer("sgd", 0.0))
    trained = {**params, HEAD: initial_head(CONFIG.width, CONFIG.vocab_size)}
    state = place(initial_state(trained, optimizer, seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    probe = PairProbe(objective=objective)
    one = partial(train_step, objective=objective, optimizer=optimizer, backward=probe)
    step, kept = compile_step(one, state, mesh), []
    for _ in range(4):
        state, metrics = step(state, frozen, batch)
        kept.append(float(metrics["mask/chosen"].value()))
    assert kept[0] == pytest.approx(1 / (1 + np.exp(-2.0)), rel=1e-5)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.2
    found = {name: tree for name, tree in state.params.items() if name != HEAD}
    assert_trees_close(found, params, rtol=0, atol=0)
    assert optax.tree.norm(state.params[HEAD]["token"]) > 1
