"""Steps of mixtures of experts: balance, geometry of pairs, devices, micro-batches."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.entanglement import pair_geometry, two_pass_geometry
from jaxalign.errors import UserError
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models import DecoderConfig, grouped
from jaxalign.models.config import ClampedSwiGLU, Experts
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters
from jaxalign.sharding import make_mesh, parameter_shardings, place
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import compile_step, gradients, initial_state, train_step
from jaxalign.training.throughput import active_fraction, matrix_parameters
from tests.slow import mostly_slow, slow
from tests.training.test_step import LENGTH, make_batch, with_joint_rows

MIXTURE = Experts(number=8, active=2, width=12, renormalised=True, balance_weight=0.3)
CONFIG = DecoderConfig(
    family="qwen3_moe",
    vocab_size=64,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=4,
    mlp_width=24,
    context_length=LENGTH,
    qk_norm="head",
    initializer_range=0.3,
    experts=MIXTURE,
)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    params, reference = (init_params(CONFIG, jax.random.key(seed)) for seed in (1, 2))
    batch = jax.tree.map(jnp.asarray, make_batch(rng))
    return params, {"policy": None, "reference": reference}, batch


def objective_of(config=CONFIG, **policy):
    loss = PREFERENCE_LOSSES["dpo"]
    return PreferenceObjective(policy=Policy(config=config, **policy), loss=loss, options={})


def weighted(weight):
    return dataclasses.replace(CONFIG, experts=dataclasses.replace(MIXTURE, balance_weight=weight))


def close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def gradient_of(world, objective, pairs=None, **options):
    params, frozen, batch = world
    batch = ReferencedBatch(pairs=batch if pairs is None else pairs, reference=None)

    def run(params):
        return gradients(objective, params, frozen, batch, jax.random.key(0), **options)[:2]

    return jax.jit(run)(params)


def test_the_weight_adds_the_same_gradient_as_often(world):
    none, some, more = (gradient_of(world, objective_of(weighted(x))) for x in (0.0, 0.5, 1.0))
    bend = jax.tree.map(lambda x, y, z: 2 * y - x - z, none[0], some[0], more[0])
    close(bend, jax.tree.map(jnp.zeros_like, bend), atol=1e-5)
    router = [x[0]["layers"]["router"]["kernel"] for x in (none, more)]
    assert np.abs(router[1] - router[0]).max() > 1e-3
    for _, metrics in (none, more):
        found = {name: float(x.value()) for name, x in metrics.items() if "router" in name}
        assert found.keys() == {"router/balance_loss", "router/entropy", "router/load"}
        assert 0 < found["router/entropy"] < np.log(8)
        assert 2 / 8 <= found["router/load"] <= 1
    assert none[1]["loss"].value() == more[1]["loss"].value()


def test_micro_batches_have_a_balance_each(world):
    """The gradient of the loss alone does not change; the balance's is the mean over the parts."""
    batch = world[2]
    both, metrics = gradient_of(world, objective_of(), micro_batches=2)
    plain, _ = gradient_of(world, objective_of(weighted(0.0)))
    wanted, losses = plain, []
    for first in range(2):
        part = jax.tree.map(lambda x, first=first: x[first::2], batch)
        of_part = [gradient_of(world, objective_of(weighted(x)), part) for x in (0.3, 0.0)]
        wanted = jax.tree.map(lambda w, x, y: w + (x - y) / 2, wanted, *(x[0] for x in of_part))
        losses.append(float(of_part[0][1]["router/balance_loss"].value()))
    close(both, wanted, atol=1e-5)
    np.testing.assert_allclose(metrics["router/balance_loss"].value(), np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize(
    ("formed", "adapted"),
    [(True, False), (False, True), slow((True, True)), slow((False, False))],
)
def test_the_geometry_of_pairs_is_that_of_two_passes(world, formed, adapted, monkeypatch):
    monkeypatch.setattr(grouped, "forms_gradients", lambda *_: formed)
    params, _, batch = world
    adapters = init_adapters(params, jax.random.key(0), rank=2, targets=["*"]) if adapted else None
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    found, wanted = (
        jax.jit(lambda p, f=f: f(p, CONFIG, batch, adapters=adapters, adapter_scale=0.5))(params)
        for f in (pair_geometry, two_pass_geometry)
    )
    close(found, wanted, rtol=2e-4, atol=1e-4)


def test_the_balance_is_in_the_update_and_not_in_the_geometry(world):
    objective, alone = objective_of(), objective_of(weighted(0.0))
    plain, metrics = gradient_of(world, objective)
    params, frozen, batch = world
    for one in (objective, alone):
        probe = PairProbe(objective=one)
        pairs = ReferencedBatch(pairs=batch, reference=None)
        grads, more, observation = jax.jit(
            lambda p, o=one, b=probe, pairs=pairs: gradients(
                o, p, frozen, pairs, jax.random.key(0), backward=b
            )
        )(params)
        if one is objective:
            close(grads, plain, atol=1e-5)
            close(more["router/load"], metrics["router/load"])
        wanted = two_pass_geometry(params, CONFIG, batch)
        close(observation.geometry.inner[:-1], wanted.inner[:-1], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"ledger: .*router_balance"):
        PairProbe(objective=objective, ledger=True)
    PairProbe(objective=alone, ledger=True)


def run(world, mesh, backward=None, steps=1, objective=None):
    params, frozen, batch = jax.device_get(world)
    optimizer, objective = optax.sgd(0.1), objective or objective_of()
    options = {} if backward is None else {"backward": backward(objective=objective, parts=True)}
    state = place(initial_state(params, optimizer, seed=0), mesh)
    frozen = {"policy": None, "reference": place(frozen["reference"], mesh)}
    step = partial(train_step, objective=objective, optimizer=optimizer, **options)
    step = compile_step(step, state, mesh)
    found = []
    for _ in range(steps):
        state, metrics = step(state, frozen, ReferencedBatch(pairs=batch, reference=None))
        means = {name: x for name, x in jax.device_get(metrics).items() if hasattr(x, "value")}
        found.append({name: float(x.value()) for name, x in means.items()})
    return jax.device_get(state.params), found


@pytest.fixture(scope="module")
def on_one_device(world):
    """Whether rows are joint -> parameters and metrics of one device."""

    @functools.cache
    def found(joint):
        params, frozen, batch = world
        batch = with_joint_rows(batch) if joint else batch
        return run((params, frozen, batch), make_mesh(devices=jax.devices()[:1]))

    return found


MESHES = [
    {"data": 1, "expert": 8},
    {"data": 2, "expert": 2, "fsdp": 2},
    {"data": 1, "expert": 2, "sequence": 2, "tensor": 2},
    {"data": 8},
]


@pytest.mark.parametrize("sizes", mostly_slow(MESHES, quick=[MESHES[0], MESHES[2]]), ids=str)
def test_eight_devices_give_what_one_gives(world, on_one_device, sizes):
    params, frozen, batch = world
    batch = batch if "tensor" in sizes else with_joint_rows(batch)
    one, one_found = on_one_device("tensor" not in sizes)
    many, many_found = run((params, frozen, batch), make_mesh(**sizes))
    for ours, theirs in zip(many_found, one_found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True)
    close(many, one, atol=1e-5)


@pytest.mark.slow  # the next test has the same kinds of parameters and more
@pytest.mark.parametrize("sizes", MESHES[1:3], ids=str)
def test_the_geometry_is_the_same_on_eight_devices(world, sizes):
    _, one = run(world, make_mesh(devices=jax.devices()[:1]), PairProbe)
    _, many = run(world, make_mesh(**sizes), PairProbe)
    assert "entanglement/layers/experts/up/cosine/1" in one[0]
    assert many[0] == pytest.approx(one[0], rel=2e-4, abs=2e-5, nan_ok=True)


def test_biases_a_clamped_gate_and_sinks_are_the_same_on_eight_devices(world, rng):
    """gpt-oss: the update and the geometry of pairs, by experts, positions and heads."""
    mixture = dataclasses.replace(MIXTURE, bias=True, clamped=ClampedSwiGLU(alpha=1.7, limit=0.4))
    config = dataclasses.replace(
        CONFIG,
        family="gpt_oss",
        qk_norm=None,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        window=4,
        windowed=(True, False),
        experts=mixture,
    )
    params = init_params(config, jax.random.key(1))
    params = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(params)
    )
    other = params, {"policy": None, "reference": params}, world[2]
    objective = objective_of(config)
    one, found = run(other, make_mesh(devices=jax.devices()[:1]), PairProbe, objective=objective)
    many, more = run(other, make_mesh(**MESHES[2]), PairProbe, objective=objective)
    assert more[0] == pytest.approx(found[0], rel=2e-4, abs=2e-5, nan_ok=True)
    close(many, one, atol=1e-5)
    assert np.abs(one["layers"]["sinks"]["logits"] - params["layers"]["sinks"]["logits"]).max() > 0
    assert "entanglement/layers/sinks/cosine/1" in found[0]


def test_experts_are_split_over_their_axis(world):
    mesh = make_mesh(data=1, expert=4, fsdp=2)
    specs = jax.tree.map(lambda s: s.spec, parameter_shardings(world[0], mesh))["layers"]
    assert tuple(specs["experts"]["up"]["kernel"])[:2] == (None, "expert")
    assert tuple(specs["experts"]["down"]["kernel"])[1] == "expert"
    assert "expert" in specs["q"]["kernel"][1]


def test_flops_are_those_of_active_experts(world):
    params = world[0]
    rest = 2 * (16 * 16 * 2 + 2 * 16 * 8 + 16 * 8) + 16 * 64  # attention, router, head
    one = 2 * 3 * 16 * 12
    assert matrix_parameters(params) == rest + 8 * one
    assert matrix_parameters(params, active=active_fraction(CONFIG)) == rest + 2 * one
