"""Switches that act on gradients, against formulas with all logits and an explicit output head."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.losses import PREFERENCE_LOSSES, PairLogProbs, Switches, calibrated, update_band
from jaxalign.losses.band import BAND_START
from jaxalign.models import decoder
from jaxalign.models.decoder import init_params
from jaxalign.models.head import shifted_head, with_shift, zero_shift
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.sharding import make_mesh, place
from jaxalign.training.masking import MaskedPreferenceObjective
from jaxalign.training.objectives import Policy, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from tests.slow import slow
from tests.training.test_step import (
    CONFIG,
    LENGTH,
    assert_trees_close,
    make_batch,
    objective_of,
    with_joint_rows,
)

TIED = dataclasses.replace(CONFIG, tied=True)
UNTIED = dataclasses.replace(CONFIG, tied=False)
OPTIONS = {"beta": 0.5}


def world_of(config, rng):
    params = init_params(config, jax.random.key(1))
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    frozen = {"policy": None, "reference": init_params(config, jax.random.key(2))}
    return params, frozen, ReferencedBatch(pairs=batch, reference=None)


def switched(config, name, switches, **options):
    objective = objective_of(name, **options)
    return dataclasses.replace(objective, policy=Policy(config=config), switches=switches)


def head_of(params, config):
    return params["embed"]["embedding"].T if config.tied else params["unembed"]["kernel"]


def sums(params, head, config, batch):
    """Log-probs of the responses, [pairs, 2], with a matrix of the head of its own."""
    rows = batch.tokens.reshape(-1, LENGTH)
    start, length = batch.prompt_length.reshape(-1, 1), batch.response_length.reshape(-1, 1)
    position = jnp.arange(1, LENGTH)[None]
    real = (position >= start) & (position < start + length)
    hidden = decoder.hidden_states(params, config, rows)
    logps = jax.nn.log_softmax(hidden @ head)[:, :-1]
    picked = jnp.take_along_axis(logps, rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(real, picked, 0.0).sum(-1).reshape(-1, 2)


def pairs_of(own, known, batch, mean=False):
    lengths = batch.response_length
    scale = lengths if mean else jnp.ones_like(lengths)
    lengths = jnp.ones_like(lengths) if mean else lengths
    own, known = own / scale, known / scale
    pairs = PairLogProbs(
        chosen=own[:, 0],
        rejected=own[:, 1],
        reference_chosen=known[:, 0],
        reference_rejected=known[:, 1],
        chosen_length=lengths[:, 0],
        rejected_length=lengths[:, 1],
    )
    return jax.tree.map(lambda x: x[:-1], pairs)  # without the filler pair


def norm(tree):
    return np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))


def test_averages_are_those_of_the_recursion(rng):
    """Logarithms of positive batches, averaged with a decay of 0.98 from the first one."""
    running = {name: jnp.float32(x) for name, x in BAND_START.items()}
    means = None
    for number in range(6):
        values = np.exp(rng.normal(size=4))
        if number in (0, 3):  # no logarithm: nothing changes
            values[number % 2] = -1.0
        before = running
        d_w, d_l, s_w, s_l = jnp.asarray(values, jnp.float32)
        running = update_band(running, (d_w, d_l), (s_w, s_l))
        if number in (0, 3):
            assert all(float(running[x]) == float(before[x]) for x in running)
            continue
        logs = np.log(values)
        means = logs if means is None else 0.98 * means + 0.02 * logs
        d_w, d_l, s_w, s_l = means
        np.testing.assert_allclose(running["log_a"], 0.5 * ((s_l - s_w) - (d_w - d_l)), rtol=1e-5)
    assert float(running["band_steps"]) == 4


def test_calibrated_log_probs_keep_their_values(rng):
    z = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32) * 100
    log_a = jnp.float32(0.7)
    np.testing.assert_array_equal(np.asarray(calibrated(z, log_a)), np.asarray(z))
    slopes = jax.grad(lambda z: calibrated(z, log_a).sum())(z)
    np.testing.assert_allclose(slopes, np.tile([np.exp(0.7), np.exp(-0.7)], (5, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "of", "log_probs", "config"),
    [
        ("dpo", "head", "sum", TIED),
        slow(("sppo", "all", "sum", UNTIED)),
        ("bco", "all", "mean", TIED),
        slow(("ipo", "head", "mean", UNTIED)),
    ],
)
def test_calibration_is_that_of_the_formulas(rng, name, of, log_probs, config):
    params, frozen, batch = world_of(config, rng)
    options = {} if name == "ipo" else OPTIONS
    objective = switched(config, name, Switches(calibration=of, log_probs=log_probs), **options)
    mean, loss = log_probs == "mean", PREFERENCE_LOSSES[name]
    known = sums(frozen["reference"], head_of(frozen["reference"], config), config, batch.pairs)

    def side(params, head, at):
        pairs = pairs_of(sums(params, head, config, batch.pairs), known, batch.pairs, mean)
        return (pairs.chosen if at == 0 else pairs.rejected).mean()

    def of_all(params, at):
        return side(params, head_of(params, config), at)

    head = head_of(params, config)
    if of == "head":
        s_w, s_l = (norm(jax.grad(side, argnums=1)(params, head, at)) for at in (0, 1))
    else:
        s_w, s_l = (norm(jax.grad(of_all)(params, at)) for at in (0, 1))
    pairs = pairs_of(sums(params, head, config, batch.pairs), known, batch.pairs, mean)

    def value(z):
        return loss(dataclasses.replace(pairs, chosen=z[:, 0], rejected=z[:, 1]), **options).mean()

    z = jnp.stack([pairs.chosen, pairs.rejected], axis=1)
    d_w, d_l = (np.array([-1, 1]) * np.asarray(jax.grad(value)(z)).sum(0)).tolist()
    a = np.sqrt((s_l / s_w) / (d_w / d_l))

    def formula(params):
        pairs = pairs_of(
            sums(params, head_of(params, config), config, batch.pairs), known, batch.pairs, mean
        )
        fixed = jax.lax.stop_gradient(pairs)
        tilde = dataclasses.replace(
            pairs,
            chosen=a * pairs.chosen + (1 - a) * fixed.chosen,
            rejected=pairs.rejected / a + (1 - 1 / a) * fixed.rejected,
        )
        return loss(tilde, **options).mean()

    expected = jax.grad(formula)(params)
    joint = dataclasses.replace(batch, pairs=with_joint_rows(batch.pairs))
    for rows, parts in ((batch, 1), (joint, 4)):
        run = jax.jit(partial(gradients, objective, micro_batches=parts))
        running = objective.running_start()
        found, metrics, _ = run(params, frozen, rows, jax.random.key(0), running=running)
        assert float(metrics["statistics/log_a"].value()) == pytest.approx(np.log(a), abs=2e-5)
        assert_trees_close(found, expected, rtol=5e-4, atol=5e-5)


@pytest.mark.parametrize(("name", "config"), [("dpo", TIED), ("bco", UNTIED)])
def test_logits_sam_is_that_of_the_formula(rng, name, config):
    """The head of the gradient is perturbed, and an embedding with the same matrix is not."""
    params, frozen, batch = world_of(config, rng)
    objective = switched(config, name, Switches(logits_sam=0.7), **OPTIONS)
    loss = PREFERENCE_LOSSES[name]
    known = sums(frozen["reference"], head_of(frozen["reference"], config), config, batch.pairs)

    def value(params, head):
        pairs = pairs_of(sums(params, head, config, batch.pairs), known, batch.pairs)
        return loss(pairs, **OPTIONS).mean()

    head = head_of(params, config)
    before, g = jax.value_and_grad(value, argnums=1)(params, head)
    shift = 0.7 * g / norm(g)
    there, expected = jax.value_and_grad(lambda p: value(p, head_of(p, config) + shift))(params)
    plain = jax.grad(lambda p: value(p, head_of(p, config)))(params)
    assert norm(jax.tree.map(jnp.subtract, plain, expected)) > 0.05 * norm(plain)
    joint = dataclasses.replace(batch, pairs=with_joint_rows(batch.pairs))
    for rows, parts in ((batch, 1), (joint, 4)):
        run = jax.jit(partial(gradients, objective, micro_batches=parts))
        running = objective.running_start()
        found, metrics, _ = run(params, frozen, rows, jax.random.key(0), running=running)
        np.testing.assert_allclose(metrics["loss"].value(), before, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss/shifted_head"].value(), there, rtol=1e-4)
        assert_trees_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_shift_survives_a_narrow_dtype(rng, config):
    """It is far below half a unit in the last place of the matrix in bfloat16."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(config, jax.random.key(1)))
    shift = jnp.asarray(rng.normal(size=zero_shift(params, config).shape), jnp.float32) * 1e-5
    hidden = jnp.asarray(rng.normal(size=(3, config.width)), jnp.bfloat16)
    inputs, kernel, _ = shifted_head(hidden, with_shift(params, shift), config)
    found = jnp.float32(inputs) @ jnp.float32(kernel)
    plain = jnp.float32(hidden) @ jnp.float32(head_of(params, config))
    wanted = jnp.float32(hidden) @ (shift.T if config.tied else shift)
    np.testing.assert_allclose(found - plain, wanted, rtol=0.05, atol=2e-6)


BOTH = Switches(calibration="all", logits_sam=0.3)


def test_adapters_and_probed_steps_take_both(rng):
    """A probed step has the update of a plain one, and coefficients through the calibration."""
    base, _, batch = world_of(CONFIG, rng)
    adapters = init_adapters(base, jax.random.key(3), rank=2, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    policy = Policy(config=CONFIG, adapter_scale=0.5)
    objective = dataclasses.replace(switched(CONFIG, "dpo", BOTH, **OPTIONS), policy=policy)
    frozen = {"policy": base, "reference": base}
    running, key = objective.running_start(), jax.random.key(0)
    found, metrics, _ = jax.jit(partial(gradients, objective))(
        adapters, frozen, batch, key, running=running
    )
    probe = PairProbe(objective=objective)
    probed, other, seen = jax.jit(partial(gradients, objective, backward=probe))(
        adapters, frozen, batch, key, running=running
    )
    assert_trees_close(found, probed, rtol=1e-3, atol=1e-4)
    log_a = float(metrics["statistics/log_a"].value())
    assert log_a == pytest.approx(float(other["statistics/log_a"].value()), abs=1e-5)
    ratio = seen.weights.chosen / seen.weights.rejected  # 1 for DPO alone
    np.testing.assert_allclose(ratio[:-1], np.exp(2 * log_a), rtol=1e-3)
    merged = with_adapters(base, adapters, 0.5)
    assert set(with_shift(merged, zero_shift(base, CONFIG))) == set(merged)


def test_a_mask_takes_both(rng):
    params, frozen, batch = world_of(CONFIG, rng)
    objective = MaskedPreferenceObjective(
        policy=Policy(config=CONFIG),
        loss=PREFERENCE_LOSSES["dpo"],
        options=OPTIONS,
        switches=BOTH,
    )
    results = [
        jax.jit(partial(gradients, objective, micro_batches=parts))(
            params, frozen, batch, jax.random.key(0), running=objective.running_start()
        )
        for parts in (1, 4)
    ]
    assert_trees_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [slow({"fsdp": 4}), {"data": 2, "tensor": 2}])
def test_a_mesh_changes_nothing(rng, shape):
    """Two steps with all switches on simulated devices have the numbers of one device."""
    params, frozen, batch = world_of(TIED, rng)
    switches = dataclasses.replace(BOTH, tail_weight=0.3, importance=True, log_probs="mean")
    objective = switched(TIED, "bco", switches, **OPTIONS)
    optimizer = optax.sgd(0.1)
    step = partial(train_step, objective=objective, optimizer=optimizer, micro_batches=2)
    results = []
    number = int(np.prod(list(shape.values())))
    for mesh in (
        make_mesh(devices=jax.devices()[:1]),
        make_mesh(devices=jax.devices()[:number], **shape),
    ):
        state = place(initial_state(params, optimizer, seed=0, running=objective.start), mesh)
        known = {"policy": None, "reference": place(frozen["reference"], mesh)}
        compiled = compile_step(step, state, mesh)
        for _ in range(2):
            state, _ = compiled(state, known, batch)
        results.append((jax.device_get(state.params), jax.device_get(state.running)))
    assert float(results[0][1]["band_steps"]) == 2
    assert_trees_close(results[0], results[1], rtol=1e-3, atol=1e-4)
