"""Switches in a step: gradients of formulas over all logits, however the batch is computed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.losses import PREFERENCE_LOSSES, Divergence, PairLogProbs, Switches, weighted
from jaxalign.models import Decoder
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.sharding import make_mesh, place
from jaxalign.training.evaluation import evaluate_preferences
from jaxalign.training.gradients import PLAIN
from jaxalign.training.masking import MaskedPreferenceObjective
from jaxalign.training.objectives import Policy, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.reference import precompute_reference
from jaxalign.training.step import gradients, initial_state
from tests.slow import mostly_slow
from tests.training.test_packed_pairs import CONFIG as PACKED
from tests.training.test_packed_pairs import packed_batches
from tests.training.test_packed_pairs import world as packed_world
from tests.training.test_step import (
    CONFIG,
    LENGTH,
    assert_trees_close,
    make_batch,
    objective_of,
    with_joint_rows,
)

SWITCHES = {
    "divergence": Switches(divergence=Divergence("jensen_shannon")),
    "tail": Switches(tail_weight=0.3),
    "mean": Switches(log_probs="mean"),
    "weights": Switches(importance=True),
    "all": Switches(
        divergence=Divergence("alpha", 0.4), log_probs="mean", tail_weight=0.3, importance=True
    ),
}
every_switch = pytest.mark.parametrize(
    "switches", mostly_slow(SWITCHES.values(), quick=[SWITCHES["all"]]), ids=SWITCHES.keys()
)


@pytest.fixture
def world(rng):
    params = init_params(CONFIG, jax.random.key(1))
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    frozen = {"policy": None, "reference": init_params(CONFIG, jax.random.key(2))}
    return params, frozen, ReferencedBatch(pairs=batch, reference=None)


def switched(name, switches, **options):
    return dataclasses.replace(objective_of(name, **options), switches=switches)


def by_hand(params, reference, batch, loss, switches, options):
    """Mean loss of the real pairs: all logits, and each switch as its paper writes it."""
    rows = batch.tokens.reshape(-1, LENGTH)
    start = batch.prompt_length.reshape(-1, 1)
    lengths = batch.response_length
    position = jnp.arange(1, LENGTH)[None]
    real = (position >= start) & (position < start + lengths.reshape(-1, 1))
    shorter = jnp.repeat(lengths.min(1), 2)[:, None]
    token_weight = jnp.where(position - start < shorter, 1.0, switches.tail_weight)

    def tokens(params):
        logps = jax.nn.log_softmax(Decoder(CONFIG, params)(rows))[:, :-1]
        picked = jnp.take_along_axis(logps, rows[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(real, picked, 0.0), jnp.log(jnp.sum(jnp.exp(logps) ** 2, axis=-1))

    own, collision = tokens(params)
    known, _ = tokens(reference)
    sums = [(token_weight * x).sum(-1).reshape(-1, 2) for x in (own, known)]
    if switches.log_probs == "mean":
        sums = [x / lengths for x in sums]
    ones = jnp.ones_like(lengths[:, 0])
    mean = switches.log_probs == "mean"
    pairs = PairLogProbs(
        chosen=sums[0][:, 0],
        rejected=sums[0][:, 1],
        reference_chosen=sums[1][:, 0],
        reference_rejected=sums[1][:, 1],
        chosen_length=ones if mean else lengths[:, 0],
        rejected_length=ones if mean else lengths[:, 1],
        divergence=switches.divergence,
    )
    pairs = jax.tree.map(lambda x: x[:-1], pairs)  # without the filler pair
    values = loss(pairs, **options)
    if switches.importance:
        aligned = jnp.where(real, own - collision, 0.0).sum(-1).reshape(-1, 2) / lengths
        values = values * jax.lax.stop_gradient(jnp.exp(aligned.sum(-1)))[:-1]
    return values.mean()


@pytest.mark.parametrize(
    ("name", "switch"),
    mostly_slow(
        [*(("dpo", x) for x in SWITCHES), ("bco", "all")],
        quick=[("dpo", "all"), ("dpo", "mean"), ("bco", "all")],
    ),
)
def test_loss_and_gradient_are_those_of_the_formulas(world, name, switch):
    params, frozen, batch = world
    switches = SWITCHES[switch]
    loss, options = PREFERENCE_LOSSES[name], {"beta": 0.5}
    expected, gradient = jax.jit(
        jax.value_and_grad(
            lambda p: by_hand(p, frozen["reference"], batch.pairs, loss, switches, options)
        )
    )(params)
    objective = switched(name, switches, **options)
    running = {}
    if name == "bco":  # a batch of its own: the mean is that of the batch
        running = {"mean_log_ratio": jnp.float32(0.0), "responses": jnp.float32(0.0)}
    joint = dataclasses.replace(batch, pairs=with_joint_rows(batch.pairs))
    ways = ((batch, 1), (batch, 4), (joint, 2)) if switch == "all" else ((joint, 2),)
    for rows, parts in ways:
        run = jax.jit(partial(gradients, objective, micro_batches=parts))
        found, metrics, _ = run(params, frozen, rows, jax.random.key(0), running=running)
        np.testing.assert_allclose(metrics["loss"].value(), expected, rtol=1e-5)
        assert_trees_close(found, gradient, rtol=2e-4, atol=2e-5)


@every_switch
def test_coefficients_of_a_probed_step_go_through_the_switches(world, switches):
    """d_w g_w - d_l g_l, with the probe's coefficients, is the gradient of the pair's own loss."""
    params, frozen, batch = world
    objective = switched("sppo", switches)
    run = jax.jit(partial(gradients, objective, backward=PairProbe(objective=objective)))
    grads, _, seen = run(params, frozen, batch, jax.random.key(0))
    plain = jax.jit(partial(gradients, objective, backward=PLAIN))
    assert_trees_close(grads, plain(params, frozen, batch, jax.random.key(0))[0], 1e-4, 5e-5)

    outputs = objective.forward(params, frozen, batch, None)

    def total(log_probs):  # the loss as a function of the two log-probs of each pair
        moved = dataclasses.replace(outputs, policy_log_probs=log_probs)
        return objective.reduce(moved, batch, jnp.float32(1.0))[0]

    slopes = jax.grad(total)(outputs.policy_log_probs)
    np.testing.assert_allclose(seen.weights.chosen[:-1], -slopes[:-1, 0], rtol=1e-4)
    np.testing.assert_allclose(seen.weights.rejected[:-1], slopes[:-1, 1], rtol=1e-4)


def test_adapters_precomputed_references_and_held_out_pairs_take_every_switch(world, tmp_path):
    base, _, batch = world
    adapters = init_adapters(base, jax.random.key(3), rank=2, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    switches, options = SWITCHES["all"], {"beta": 0.5}
    objective = switched("dpo", switches, **options)
    policy = Policy(config=CONFIG, adapter_scale=0.5)
    objective = dataclasses.replace(objective, policy=policy)
    frozen = {"policy": base, "reference": base}
    loss = PREFERENCE_LOSSES["dpo"]

    def formula(adapters):
        params = with_adapters(base, adapters, 0.5)
        return by_hand(params, base, batch.pairs, loss, switches, options)

    expected, gradient = jax.jit(jax.value_and_grad(formula))(adapters)
    mesh = make_mesh(devices=jax.devices()[:1])
    put = partial(jax.tree.map, jnp.asarray)
    path = tmp_path / "reference.npz"
    records = np.asarray(batch.pairs.record_index[batch.pairs.weight > 0])
    table = precompute_reference(
        objective, base, [batch.pairs], put, path, mesh, "own", records=records
    )
    table = np.vstack([table, np.zeros((1, 2), np.float32)])  # the filler pair is not in it
    stored = dataclasses.replace(batch, reference=jnp.asarray(table[batch.pairs.record_index]))
    for rows in (batch, stored):
        found, metrics, _ = jax.jit(partial(gradients, objective))(
            adapters, frozen, rows, jax.random.key(0)
        )
        np.testing.assert_allclose(metrics["loss"].value(), expected, rtol=1e-5)
        assert_trees_close(found, gradient, rtol=2e-4, atol=2e-5)
    state = place(initial_state(adapters, optax.sgd(0.1), seed=0), mesh)
    held_out = evaluate_preferences(objective, [jax.device_get(batch.pairs)], mesh)(state, frozen)
    np.testing.assert_allclose(held_out["loss"], expected, rtol=1e-5)
    assert {"importance", "kl"} <= set(held_out)


def test_rewards_are_scores_and_log_probs_those_of_whole_responses(world):
    params, frozen, batch = world
    plain, switches = objective_of("dpo", beta=0.5), SWITCHES["all"]
    objective = switched("dpo", switches, beta=0.5)
    numbers = []
    for one in (plain, objective):
        outputs = one.forward(params, frozen, batch, None)
        metrics = one.reduce(outputs, batch, one.count(batch))[1]
        numbers.append({name: float(mean.value()) for name, mean in metrics.items()})
        pairs = jax.tree.map(lambda x: x[:-1], one.seen(outputs, batch.pairs))
        expected = 0.5 * pairs.divergence.score(pairs.chosen - pairs.reference_chosen).mean()
        np.testing.assert_allclose(numbers[-1]["rewards/chosen"], expected, rtol=1e-5)
    assert numbers[0]["rewards/chosen"] != numbers[1]["rewards/chosen"]
    for name in ("logps/chosen", "logps/rejected", "logps/mean_accuracies"):
        assert numbers[0][name] == pytest.approx(numbers[1][name], rel=1e-6)


def test_a_mask_and_token_weights_multiply(world):
    params, frozen, batch = world
    fields = {"policy": Policy(config=CONFIG), "loss": PREFERENCE_LOSSES["dpo"], "options": {}}
    masked = MaskedPreferenceObjective(**fields, switches=Switches(tail_weight=0.0))
    whole = MaskedPreferenceObjective(**fields)
    length = batch.pairs.response_length
    short = jnp.minimum(length, length.min(1, keepdims=True))
    found, kept = (one.forward(params, frozen, batch, None) for one in (masked, whole))
    same = np.flatnonzero((length == short).all(1))
    np.testing.assert_allclose(found.policy_log_probs[same], kept.policy_log_probs[same], rtol=1e-6)
    assert not np.allclose(found.policy_log_probs, kept.policy_log_probs)
    np.testing.assert_allclose(found.whole, kept.whole, rtol=1e-6)


def test_packed_pairs_have_the_numbers_of_padded_pairs():
    params, frozen = packed_world()
    objective = dataclasses.replace(
        objective_of("dpo"), policy=Policy(config=PACKED), switches=SWITCHES["all"]
    )
    batch = ReferencedBatch(pairs=jax.tree.map(jnp.asarray, packed_batches()[0]), reference=None)
    apart = dataclasses.replace(batch, pairs=batch.pairs.apart())
    found, expected = (objective.forward(params, frozen, x, None) for x in (batch, apart))
    real = np.asarray(batch.pairs.weight) > 0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one[real], other[real], rtol=1e-4, atol=1e-5)


def test_a_weighted_sum_with_statistics_and_switches_does_not_depend_on_micro_batches(world):
    params, frozen, batch = world
    loss = weighted(
        [(PREFERENCE_LOSSES[name], x) for name, x in (("dpo", 0.8), ("bco", 0.2), ("sft", 1.0))]
    )
    objective = dataclasses.replace(
        objective_of("bco"), loss=loss, options={"dpo.beta": 0.5}, switches=SWITCHES["all"]
    )
    running = {name: jnp.float32(x) for name, x in objective.statistics.start.items()}
    results = [
        jax.jit(partial(gradients, objective, micro_batches=parts))(
            params, frozen, batch, jax.random.key(0), running=running
        )
        for parts in (1, 4)
    ]
    assert_trees_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, mean in results[0][1].items():
        np.testing.assert_allclose(mean.value(), results[1][1][name].value(), rtol=1e-4)
    assert "statistics/bco.mean_log_ratio" in results[0][1]
