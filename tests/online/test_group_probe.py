"""A probed online step: the plain update, and the changes that its own gradients predict."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.data import PairBatch
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters
from jaxalign.online import ALGORITHMS, OnlineObjective, RolloutBatch
from jaxalign.online.group_probe import GroupProbe
from jaxalign.online.step import update_step
from jaxalign.sharding import make_mesh, place
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import PLAIN, compile_step, gradients, initial_state, train_step
from tests.entanglement.test_groups import group_batch
from tests.slow import mostly_slow, slow
from tests.training.test_step import CONFIG, assert_trees_close

PROMPTS, SAMPLES = 4, 4
GROUPS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp")


def rollout(*, prompts=PROMPTS, samples=SAMPLES, seed=0, weight=None):
    """Random responses and rewards; the old policy's log-probs are not the policy's."""
    responses, noise = group_batch(prompts=prompts, samples=samples, seed=seed)
    rng = np.random.default_rng(seed + 1)
    names = "tokens", "prompt_length", "response_tokens", "response_length", "record_index"
    fields = {name: getattr(responses, name) for name in names}
    weight = jnp.ones(prompts) if weight is None else jnp.asarray(weight, jnp.float32)
    return RolloutBatch(
        responses=PairBatch(**fields, weight=weight),
        preference=jnp.asarray(rng.uniform(size=(prompts, samples, samples)), jnp.float32),
        reward=jnp.asarray(rng.integers(0, 2, (prompts, samples)), jnp.float32),
        baseline=jnp.zeros((prompts, samples)),
        sampled_log_prob=jnp.asarray(-3 + 0.1 * noise, jnp.float32),
        advantage=jnp.asarray(rng.normal(size=noise.shape), jnp.float32),
    )


def objective_of(name, *, policy=None, **options):
    policy = Policy(config=CONFIG) if policy is None else policy
    return OnlineObjective(policy=policy, algorithm=ALGORITHMS[name](**options), max_tokens=5)


@pytest.fixture(scope="module")
def models():
    params = init_params(CONFIG, jax.random.key(1))
    return params, {"policy": None, "reference": init_params(CONFIG, jax.random.key(2))}


def probed(objective, trained, frozen, batch, **options):
    """Gradient, metrics and observation of a probed step; and the same of a plain one."""
    key, probe = jax.random.key(0), GroupProbe(objective=objective)
    both = (
        jax.jit(partial(gradients, objective, backward=w, **options))(trained, frozen, batch, key)
        for w in (probe, PLAIN)
    )
    return next(both), next(both)


@pytest.mark.parametrize(
    ("name", "parts"),
    mostly_slow(
        [*((name, 1) for name in GROUPS), ("grpo", 2)],
        quick=[("grpo", 2), ("gspo", 1), ("reinforce_pp", 1)],
    ),
)
def test_effects_add_up_to_the_change_along_the_prompts_own_gradient(models, name, parts):
    """By forward mode: the derivative of every log-prob along the gradient of one prompt's loss."""
    params, frozen = models
    options = {} if name == "reinforce_pp" else {"updates": 2}  # ratios are then not all 1
    objective, batch = objective_of(name, samples=SAMPLES, **options), rollout()
    (grads, _, seen), (plain, _, _) = probed(objective, params, frozen, batch, micro_batches=parts)
    assert_trees_close(grads, plain, rtol=1e-6, atol=1e-7)
    count = objective.count(batch)

    @jax.jit
    def expected(params, at):
        alone = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, 1), batch)

        def log_probs(params):
            return objective.forward(params, frozen, alone, None).log_prob.sum(-1)[0]

        def loss(params):
            return objective.reduce(objective.forward(params, frozen, alone, None), alone, count)[0]

        descent = jax.tree.map(jnp.negative, jax.grad(loss)(params))
        jacobian = jax.jacrev(log_probs)(params)
        along = jax.tree.map(lambda x, d: x.reshape(len(x), -1) @ d.ravel(), jacobian, descent)
        return sum(jax.tree.leaves(along))

    changes = np.stack([expected(params, at) for at in range(PROMPTS)])
    found = np.asarray(seen.geometry[""].effects.sum(-1))
    np.testing.assert_allclose(found, changes, rtol=1e-4, atol=2e-5 * np.abs(changes).max())
    if name == "reinforce_pp":  # its advantages differ between tokens
        return
    wanted = np.sign(batch.reward - batch.reward.mean(1, keepdims=True))
    kept = seen.advantage != 0  # the others are clipped
    np.testing.assert_array_equal(np.sign(seen.advantage)[kept], wanted[kept])
    assert kept.mean() > 0.3


def test_a_pairwise_loss_of_two_responses_is_the_pair_probe(models):
    params, frozen = models
    batch = rollout(samples=2, weight=[1, 1, 1, 0])
    first_wins = jnp.tile(jnp.array([[0.5, 1.0], [0.0, 0.5]]), (PROMPTS, 1, 1))
    batch = RolloutBatch(**{**vars(batch), "preference": first_wins})
    online, optimizer = objective_of("online_dpo", beta=0.1), optax.sgd(1e-2)
    pairs = PreferenceObjective(
        policy=Policy(config=CONFIG), loss=PREFERENCE_LOSSES["dpo"], options={"beta": 0.1}
    )
    state = initial_state(params, optimizer, seed=0)

    def run(objective, probe, batch):
        step = partial(train_step, objective=objective, optimizer=optimizer, backward=probe)
        metrics = jax.jit(step)(state, frozen, batch)[1]
        values = {name: x.value() for name, x in metrics.items() if name.startswith("entangle")}
        return {name.removeprefix("entanglement/"): float(x) for name, x in values.items()}

    group = run(online, GroupProbe(objective=online, realised=True), batch)
    pair = run(
        pairs,
        PairProbe(objective=pairs, realised=True),
        ReferencedBatch(pairs=batch.responses, reference=None),
    )
    for sign, side in (("positive", "chosen"), ("negative", "rejected")):
        for name in ("predicted", "realised", "norm"):
            wanted = pair[f"{name}_{side}"]
            assert group[f"{sign}/{name}"] == pytest.approx(wanted, rel=1e-4), name
    assert group["cosine_between"] == pytest.approx(pair["cosine"], abs=1e-5)
    assert group["displaced"] == pytest.approx(pair["both_down"] + pair["reversed"])
    assert group["lifted"] == pytest.approx(pair["both_up"] + pair["reversed"])
    assert group["positive"] == group["negative"] == 0.5


def test_adapters_are_watched_and_the_parts_add_up(models):
    base, _ = models
    adapters = init_adapters(base, jax.random.key(3), rank=4, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    objective = objective_of(
        "grpo", samples=SAMPLES, policy=Policy(config=CONFIG, adapter_scale=0.5)
    )
    frozen, batch, key = {"policy": base, "reference": base}, rollout(), jax.random.key(0)
    probe = GroupProbe(objective=objective, parts=True)
    run = jax.jit(partial(gradients, objective, backward=probe))
    _, _, seen = run(adapters, frozen, batch, key)
    names = {name for name in seen.geometry if name}
    assert names == {"layers/q", "layers/down"}
    whole = sum(seen.geometry[name].effects.sum(1) for name in names)
    np.testing.assert_allclose(whole, seen.geometry[""].effects, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [slow({"data": 4}), {"fsdp": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_with_updates_and_minibatches(models, sizes):
    params, frozen = jax.device_get(models)
    objective = objective_of("grpo", samples=SAMPLES, updates=2)
    optimizer, batch = optax.sgd(1e-3), jax.device_get(rollout())
    step = partial(update_step, objective=objective, optimizer=optimizer, micro_batches=1)
    metrics = []
    for mesh, probe in (
        (make_mesh(devices=jax.devices()[:1]), PLAIN),
        (make_mesh(devices=jax.devices()[:1]), GroupProbe(objective=objective)),
        (
            make_mesh(**sizes, devices=jax.devices()[:4]),
            GroupProbe(objective=objective, parts=True, realised=True),
        ),
    ):
        state = place(initial_state(params, optimizer, seed=0), mesh)
        placed = {"policy": None, "reference": place(frozen["reference"], mesh)}
        run = compile_step(partial(step, backward=probe), state, mesh)
        _, found = run(state, placed, batch)
        metrics.append({k: float(x.value()) for k, x in found.items() if hasattr(x, "value")})
    plain, alone, spread = metrics
    assert plain["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for name, value in alone.items():
        assert spread[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    assert "entanglement/layers/q/1/positive/from_negative" in spread
    assert 0 <= spread["entanglement/agreement"] <= 1
