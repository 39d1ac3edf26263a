"""A watched step makes the plain step's update and sees what two passes per pair would."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.entanglement import coefficients, first_order_changes, two_pass_geometry
from jaxalign.entanglement.observation import summary
from jaxalign.entanglement.reweighting import centred, normalised
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models import probes
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters
from jaxalign.sharding import make_mesh, place
from jaxalign.training.gradients import PLAIN
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch, as_pairs
from jaxalign.training.optimizers import make_optimizer, preconditioner
from jaxalign.training.pair_probe import PairProbe, can_rest
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.slow import mostly_slow
from tests.training.test_step import CONFIG, assert_trees_close, make_batch, objective_of

FIELDS = "chosen", "rejected", "inner"


@pytest.fixture
def world(rng):
    params = init_params(CONFIG, jax.random.key(1))
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    frozen = {"policy": None, "reference": init_params(CONFIG, jax.random.key(2))}
    return params, frozen, ReferencedBatch(pairs=batch, reference=None)


def watched(objective, trained, frozen, batch, **options):
    """Jitted gradient, metrics and observation; and the same without a probe."""
    key, probe = jax.random.key(0), PairProbe(objective=objective)
    both = (
        jax.jit(partial(gradients, objective, backward=w, **options))(trained, frozen, batch, key)
        for w in (probe, PLAIN)
    )
    return next(both), next(both)


@pytest.mark.parametrize(
    ("name", "parts"),
    mostly_slow(
        itertools.product(["dpo", "simpo", "sppo", "kto"], [1, 4]),
        quick=[("dpo", 1), ("simpo", 4), ("sppo", 1), ("kto", 4)],
    ),
)
def test_geometry_and_coefficients_come_with_the_same_gradient(world, name, parts):
    params, frozen, batch = world
    objective = objective_of(name)
    (grads, _, seen), (plain, _, nothing) = watched(
        objective, params, frozen, batch, micro_batches=parts
    )
    assert nothing is None
    assert_trees_close(grads, plain, rtol=1e-4, atol=5e-5)

    expected = jax.jit(lambda p: two_pass_geometry(p, CONFIG, batch.pairs))(params)
    for field in FIELDS:
        found, wanted = getattr(seen.geometry, field), getattr(expected, field)
        np.testing.assert_allclose(found[:-1], wanted[:-1], rtol=1e-4)
        assert jnp.isnan(found[-1])  # the filler pair has no weight

    outputs = objective.forward(params, frozen, batch, None)
    pairs = as_pairs(outputs.policy_log_probs, outputs.reference_log_probs, batch.pairs)
    real = jax.tree.map(lambda x: x[:-1], pairs)
    if name != "kto":  # whose batch statistic counts the filler in
        wanted = coefficients(PREFERENCE_LOSSES[name], real)
        np.testing.assert_allclose(seen.weights.chosen[:-1], wanted.chosen, rtol=1e-4)
        np.testing.assert_allclose(seen.weights.rejected[:-1], wanted.rejected, rtol=1e-4)
    np.testing.assert_allclose(seen.log_probs, outputs.policy_log_probs, rtol=1e-5)


@pytest.mark.parametrize("name", ["slic", "slic_norm", "rrhf"])
def test_pairs_whose_hinge_is_at_rest_are_seen(world, name):
    params, frozen, batch = world
    # deltas between the pairs' gaps, so that some rest
    objective = objective_of(name, **({} if name == "rrhf" else {"delta": 1e-3}))
    (grads, _, seen), (plain, _, _) = watched(objective, params, frozen, batch)
    assert_trees_close(grads, plain, rtol=1e-4, atol=5e-5)
    rejected = np.asarray(seen.weights.rejected[:-1])
    assert 0 < np.sum(rejected == 0) < len(rejected)
    expected = jax.jit(lambda p: two_pass_geometry(p, CONFIG, batch.pairs))(params)
    for field in FIELDS:
        found, wanted = getattr(seen.geometry, field), getattr(expected, field)
        np.testing.assert_allclose(found[:-1], wanted[:-1], rtol=1e-4)
        assert jnp.isnan(found[-1])
    numbers = {x: np.asarray(y)[:-1] for x, y in summary(seen).items()}
    rests = (rejected == 0) & (np.asarray(seen.weights.chosen)[:-1] == 0)
    assert (numbers["entanglement/undefined"] == rests).all()
    assert (numbers["entanglement/in_band"] == numbers["entanglement/ideal"])[~rests].all()
    parted = ~rests & (np.asarray(seen.geometry.inner)[:-1] < 0)
    assert (numbers["entanglement/ideal"][parted & (rejected == 0)] == 1).all()


def test_losses_that_can_rest_are_known():
    resting = {
        name
        for name in ("dpo", "ipo", "simpo", "dpop", "slic", "rrhf", "slic_norm", "sft")
        if can_rest(objective_of(name))
    }
    assert resting == {"slic", "rrhf", "slic_norm", "sft"}

    @jax.jit
    def traced(x):
        return x if can_rest(objective_of("slic")) else -x

    assert traced(2.0) == 2.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_are_watched(world, dropout):
    base, _, batch = world
    adapters = init_adapters(base, jax.random.key(3), rank=4, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    policy = Policy(config=CONFIG, adapter_scale=0.5, adapter_dropout=dropout)
    objective = PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})
    frozen = {"policy": base, "reference": base}
    (grads, _, seen), (plain, _, _) = watched(objective, adapters, frozen, batch)
    assert_trees_close(grads, plain, rtol=1e-4, atol=5e-5)
    if not dropout:
        expected = jax.jit(
            lambda a: two_pass_geometry(base, CONFIG, batch.pairs, adapters=a, adapter_scale=0.5)
        )(adapters)
        for field in FIELDS:
            found, wanted = getattr(seen.geometry, field), getattr(expected, field)
            np.testing.assert_allclose(found[:-1], wanted[:-1], rtol=1e-4)


def test_the_preconditioned_geometry_predicts_what_adamw_does_to_a_pair_alone(world):
    """Without momentum the change is, to first order, that along optax's own update."""
    params, frozen, batch = world
    alone = jax.tree.map(lambda x: x[:1], batch)
    objective, rate = objective_of("simpo"), 1e-3
    optimizer = make_optimizer("adamw", rate, b1=0.0, b2=0.9, eps=1e-4, clip_norm=None)
    state = initial_state(params, optimizer, seed=0)
    probe = PairProbe(objective=objective, preconditioner=partial(preconditioner, b2=0.9, eps=1e-4))
    step = jax.jit(partial(train_step, objective=objective, optimizer=optimizer, backward=probe))
    for _ in range(2):  # the second step's moment holds two gradients
        before, (state, metrics) = state.params, step(state, frozen, alone)
    update = jax.tree.map(jnp.subtract, state.params, before)
    rows = jax.jit(
        jax.jacrev(lambda p: objective.forward(p, frozen, alone, None).policy_log_probs[0])
    )(before)
    along = jax.tree.map(lambda row, u: row.reshape(2, -1) @ u.ravel(), rows, update)
    changes = sum(jax.tree.leaves(along))
    for name, change in zip(("chosen", "rejected"), changes, strict=True):
        predicted = metrics[f"entanglement/adamw/predicted_{name}"].value()
        np.testing.assert_allclose(rate * predicted, change, rtol=1e-3)
    assert "entanglement/adamw/cosine" in metrics


def test_a_saturated_pair_and_a_resting_one_are_measured(world):
    params, frozen, batch = world
    expected = jax.jit(lambda p: two_pass_geometry(p, CONFIG, batch.pairs))(params)
    reference = jnp.zeros((8, 2)).at[0, 1].set(180.0)  # d_w = d_l = 0.1 sigmoid(-18)
    saturated = ReferencedBatch(pairs=batch.pairs, reference=reference)
    (_, _, seen), _ = watched(objective_of("dpo"), params, frozen, saturated)
    assert seen.weights.chosen[0] < 1e-7
    np.testing.assert_allclose(seen.geometry.inner[:-1], expected.inner[:-1], rtol=1e-4)

    resting = ReferencedBatch(pairs=batch.pairs, reference=jnp.zeros((8, 2)))
    (_, _, seen), _ = watched(objective_of("minor_dpo"), params, frozen, resting)
    assert not seen.weights.rejected[:-1].any()  # rejected is below the reference: d_l = 0
    np.testing.assert_allclose(seen.geometry.rejected[:-1], expected.rejected[:-1], rtol=1e-4)
    np.testing.assert_allclose(seen.geometry.chosen[:-1], expected.chosen[:-1], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "parts"),
    mostly_slow(itertools.product(["simpo", "kto"], [1, 2]), quick=[("simpo", 1), ("kto", 2)]),
)
def test_cures_change_the_gradient_as_they_say(world, name, parts):
    """The gradient of a reweighted step is that of the log-probs with the new weights."""
    params, frozen, batch = world
    objective, key = objective_of(name), jax.random.key(0)
    expected = jax.jit(lambda p: two_pass_geometry(p, CONFIG, batch.pairs))(params)
    (_, _, plain), _ = watched(objective, params, frozen, batch)
    for reweighting in (normalised, centred):
        probe = PairProbe(objective=objective, reweighting=reweighting)
        run = jax.jit(partial(gradients, objective, backward=probe, micro_batches=parts))
        grads, _, seen = run(params, frozen, batch, key)
        weights = reweighting(plain.weights, expected)
        np.testing.assert_allclose(seen.weights.chosen[:-1], weights.chosen[:-1], rtol=1e-3)

        def loss(params, weights=weights):
            a, b = objective.forward(params, frozen, batch, None).policy_log_probs[:-1].T
            return jnp.mean(weights.rejected[:-1] * b - weights.chosen[:-1] * a)

        assert_trees_close(grads, jax.jit(jax.grad(loss))(params), rtol=1e-3, atol=1e-4)
        changes = first_order_changes(expected, weights)
        if reweighting is centred:  # ideal whatever the coefficients are
            assert (changes[0][:-1] > 0).all()
            assert (changes[1][:-1] < 0).all()


MESHES = [{"data": 8}, {"fsdp": 8, "data": 1}, {"fsdp": 2, "sequence": 2, "tensor": 2}]


@pytest.mark.parametrize(
    ("sizes", "formed"),
    mostly_slow(
        itertools.product(MESHES, [True, False]), quick=[(MESHES[0], False), (MESHES[2], True)]
    ),
    ids=str,
)
def test_on_a_mesh_and_in_the_metrics(world, sizes, formed, monkeypatch):
    monkeypatch.setattr(probes, "forms_gradients", lambda *_: formed)
    params, frozen, batch = jax.device_get(world)
    expected = jax.jit(lambda p: two_pass_geometry(p, CONFIG, batch.pairs))(params)
    mesh, optimizer = make_mesh(**sizes), optax.sgd(1e-3)
    state = place(initial_state(params, optimizer, seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    objective = objective_of("dpo")
    step = partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        backward=PairProbe(objective=objective, parts=True, realised=True),
    )
    _, metrics = compile_step(step, state, mesh)(state, frozen, batch)
    cosines = expected.inner / jnp.sqrt(expected.chosen * expected.rejected)
    found = {name: float(x.value()) for name, x in metrics.items() if hasattr(x, "value")}
    np.testing.assert_allclose(found["entanglement/cosine"], cosines[:-1].mean(), rtol=1e-4)
    changes = found["entanglement/realised_chosen"], found["entanglement/realised_rejected"]
    assert changes[0] > changes[1]
    assert "entanglement/layers/q/cosine/1" in found
    named = ("ideal", "both_down", "both_up", "reversed", "undefined")
    assert sum(found[f"entanglement/{name}"] for name in named) == pytest.approx(1.0)
