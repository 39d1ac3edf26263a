"""The GRPO family through the online step: gradients, dynamic sampling, truncated rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from jaxalign.errors import UserError
from jaxalign.generation import Sampling
from jaxalign.online import ALGORITHMS, OnlineObjective
from jaxalign.online.resampling import choose, is_flat, replaced
from jaxalign.online.sampler import Annotated, Sampled, overlong_penalty, rollout_batch
from jaxalign.online.step import policies_of, update_step
from jaxalign.sharding import make_mesh
from jaxalign.training.objectives import Policy
from jaxalign.training.step import initial_state
from tests.online.test_algorithms import gradient
from tests.online.test_step import WORLD, online, prompts_of, run
from tests.online.world import CONFIG, END, World
from tests.slow import mostly_slow

FAMILY = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp")


def test_dr_grpos_gradient_is_the_rewards():
    """In expectation (G - 1) / G of it, divided by the longest length; GRPO's is not."""
    world = World(2)
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), world.params
    )
    exact = gradient(world, moved, "regularised_policy_gradient", tau=0.0)
    ours = gradient(world, moved, "dr_grpo", samples=2)
    biased = gradient(world, moved, "grpo", samples=2, beta=0.0)
    scale = float(optax.tree.norm(exact))
    off = 0.0
    for one, two, three in zip(*map(jax.tree.leaves, (exact, ours, biased)), strict=True):
        np.testing.assert_allclose(one, 4 * two, atol=1e-5 * scale)
        off = max(off, float(jnp.abs(one - 4 * three).max()) / scale)
    assert off > 0.02


@pytest.mark.parametrize("name", mostly_slow(FAMILY, quick=["grpo", "reinforce_pp"]))
def test_a_reward_is_climbed(name):
    options = {"samples": 4} if name != "reinforce_pp" else {"minibatches": 2, "updates": 2}
    step, state, frozen = online(name, **options)
    reward = WORLD.rewards(None, WORLD.names)
    before = WORLD.policy(WORLD.params) @ reward
    state, lines = run(step, state, frozen, steps=8, number=16)
    assert WORLD.policy(state.params) @ reward > before + 0.2
    if name != "reinforce_pp":
        assert 0 < lines[0]["rollout/spread"] <= 1


def rollout(step, state, frozen, samples, reward=None):
    sampled = step.sampler(
        policies_of(step.policy, state, frozen),
        {"policy": 1.0},
        prompts_of(8),
        jax.random.key(0),
        samples=samples,
    )
    rewards = np.random.default_rng(0).normal(size=(8, samples)) if reward is None else reward
    batch = rollout_batch(prompts_of(8), sampled, Annotated(reward=rewards))
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gspo", {"samples": 2, "minibatches": 2, "updates": 2}),
        ("reinforce_pp", {"samples": 2}),
    ],
)
def test_micro_batches_change_nothing(name, options):
    step, state, frozen = online(name, **options)
    batch = rollout(step, state, frozen, 2)
    objective = OnlineObjective(policy=Policy(config=CONFIG), algorithm=step.algorithm)
    rule = optax.sgd(0.1)
    found = []
    for micro_batches in (1, 2):
        start = initial_state(WORLD.params, rule, seed=0)
        one = functools.partial(
            update_step, objective=objective, optimizer=rule, micro_batches=micro_batches
        )
        found.append(jax.jit(one)(start, frozen, batch)[0].params)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    changed = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), found[0], WORLD.params)
    assert max(jax.tree.leaves(changed)) > 1e-4


def test_a_mesh_makes_the_same_updates():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rule = optax.sgd(0.1)
    alone, _ = run(*online("grpo", optimizer=rule, samples=2, updates=2), steps=2)
    shared, _ = run(*online("grpo", optimizer=rule, samples=2, updates=2, mesh=mesh), steps=2)
    for one, other in zip(*map(jax.tree.leaves, (alone.params, shared.params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_old_log_probs_are_those_before_the_updates():
    """A second update from the same rollout has a ratio of the two policies, which clips."""
    step, state, frozen = online("grpo", samples=2, updates=1, beta=0.0)
    batch = rollout(step, state, frozen, 2)

    def moved(updates, clip, rate=0.5):
        algorithm = ALGORITHMS["grpo"](
            samples=2, updates=updates, beta=0.0, clip=clip, clip_high=clip
        )
        objective = OnlineObjective(policy=step.policy, algorithm=algorithm)
        rule = optax.sgd(rate)
        start = initial_state(WORLD.params, rule, seed=0)
        one = functools.partial(update_step, objective=objective, optimizer=rule, micro_batches=1)
        return jax.jit(one)(start, frozen, batch)[0].params["embed"]["embedding"]

    once, twice = moved(1, 0.2), moved(2, 0.9)
    np.testing.assert_allclose(moved(1, 0.9), once, atol=1e-7)  # at ratio 1 nothing is clipped
    assert np.abs(twice - once).max() > 1e-3
    assert np.abs(moved(2, 1e-6) - twice).max() > 1e-3  # at the second they are not 1


def test_tokens_are_weighed_by_the_probability_that_the_rules_keep():
    step, state, frozen = online("grpo", samples=4)
    sampling = Sampling(max_tokens=2, end_tokens=(END,), top_k=2)
    step = dataclasses.replace(step, sampler=dataclasses.replace(step.sampler, sampling=sampling))
    sampled = step.sampler(
        policies_of(step.policy, state, frozen),
        {"policy": 1.0},
        prompts_of(8),
        jax.random.key(0),
        samples=4,
    )
    said = Annotated(reward=np.zeros((8, 4)))
    batch = rollout_batch(prompts_of(8), sampled, said, importance=True)
    policy = WORLD.policy(WORLD.params)
    first = np.array([response[0] for response in WORLD.responses])
    kept = np.sort([policy[first == token].sum() for token in range(4)])[-2:].sum()
    np.testing.assert_allclose(batch.importance[:, :, 0], kept, rtol=1e-5)
    assert (batch.importance <= 1 + 1e-6).all()
    assert rollout_batch(prompts_of(8), sampled, said).importance is None
    _, lines = run(step, state, frozen, steps=1)
    assert lines[0]["finite"] == 1


def test_weights_undo_the_truncation_up_to_the_tokens_that_are_never_sampled(rng):
    """Over kept tokens, the weighed gradient is the whole distribution's, summed over them."""
    logits = rng.normal(size=6)
    policy, score = softmax(logits), np.eye(6) - softmax(logits)
    kept = policy >= np.sort(policy)[-3]
    drawn = np.where(kept, policy, 0) / policy[kept].sum()
    weight = np.exp(log_softmax(logits)[kept] - np.log(drawn[kept]))
    reward = rng.normal(size=6)
    np.testing.assert_allclose(
        (drawn[kept] * weight * reward[kept]) @ score[kept],
        (policy * kept * reward) @ score,
    )


def test_the_soft_penalty_on_length():
    found = overlong_penalty(np.array([0, 80, 90, 100]), 100, 0.2)
    np.testing.assert_allclose(found, [0, 0, 0.5, 1])
    assert not overlong_penalty(np.array([100]), 100, 0.0).any()


def group(rewards, letter):
    number, samples = np.shape(rewards)
    sampled = Sampled(
        tokens=np.full((number, samples, 2), ord(letter)),
        length=np.full((number, samples), 2),
        finished=np.ones((number, samples), bool),
        log_prob={"policy": np.full((number, samples, 2), -1.0)},
        texts=[[f"{letter}{row}"] * samples for row in range(number)],
        drawn=np.full((number, samples, 2), -1.0),
    )
    reasons = ["no reward" if np.isnan(row).any() else "" for row in np.asarray(rewards)]
    return sampled, Annotated(reward=np.asarray(rewards, float), reasons=reasons)


def test_flat_groups_are_replaced_by_their_first_new_group_with_a_spread():
    before = group([[1, 1], [0, 1], [0, 0], [np.nan, 0]], "a")
    flat = is_flat(before[1].reward)
    assert flat.tolist() == [True, False, True, False]
    rows = choose(flat)
    assert rows.tolist() == [0, 2, 0, 2]
    fresh = group([[1, 1], [np.nan, 1], [0, 1], [1, 0]], "b")
    sampled, annotated = replaced(before, fresh, flat, rows)
    assert [row[0] for row in sampled.texts] == ["b2", "a1", "b3", "a3"]
    np.testing.assert_array_equal(annotated.reward, [[0, 1], [0, 1], [1, 0], [np.nan, 0]])
    assert list(annotated.reasons) == ["", "", "", "no reward"]
    assert sampled.tokens[:, 0, 0].tolist() == [98, 97, 98, 97]
    assert choose(np.zeros(3, bool)).tolist() == [0, 1, 2]


class Rare:
    """A reward for few of the responses."""

    def rewards(self, prompts, responses):
        return np.array([float(response == "a") for response in responses])


def test_dynamic_sampling_fills_the_batch_and_drops_what_stays_flat():
    kept = {}
    for resamples in (0, 3):
        recorded = []
        step, state, frozen = online(
            "dapo",
            annotator=Rare(),
            samples=2,
            resamples=resamples,
            record=lambda *x, recorded=recorded: recorded.append(x),
        )
        state, lines = run(step, state, frozen, steps=1, number=32)
        assert len(recorded) == 1
        kept[resamples] = 1 - is_flat(recorded[0][3].reward).mean()
        assert lines[0]["rollout/spread"] == pytest.approx(kept[0])  # of the first draw
        assert lines[0]["annotation/failed"] == 0
    assert kept[3] > kept[0] + 0.2


def test_a_batch_without_any_spread_moves_nothing():
    class Same:
        def rewards(self, prompts, responses):
            return np.ones(len(responses))

    step, state, frozen = online("dapo", annotator=Same(), samples=2, optimizer=optax.sgd(1.0))
    before = np.asarray(state.params["embed"]["embedding"])
    state, lines = run(step, state, frozen, steps=1)
    assert lines[0]["skipped"] == 0
    assert lines[0]["rollout/spread"] == 0
    np.testing.assert_array_equal(before, state.params["embed"]["embedding"])


def test_what_is_out_of_range_is_named():
    with pytest.raises(UserError, match="1 response to a prompt is no group"):
        ALGORITHMS["grpo"](samples=1)
    with pytest.raises(UserError, match="overlong: 2"):
        ALGORITHMS["dapo"](overlong=2.0)
    with pytest.raises(UserError, match="resamples: -1"):
        ALGORITHMS["dapo"](resamples=-1)
