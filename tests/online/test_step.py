"""The online step: samples, verdicts and updates fit together, on one device and on several."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import Verdicts
from jaxalign.games import divergence, equilibrium
from jaxalign.generation import Sampling
from jaxalign.models import EncoderDecoderConfig, encoder_decoder, tempered
from jaxalign.online import ALGORITHMS, OnlineObjective, PromptBatch
from jaxalign.online.sampler import (
    Annotated,
    Sampled,
    Sampler,
    baselines,
    draws_of,
    from_data,
    joined,
    rollout_batch,
)
from jaxalign.online.step import (
    OnlineStep,
    TextRecorder,
    policies_of,
    update_step,
    with_history,
)
from jaxalign.sharding import make_mesh, place
from jaxalign.training.objectives import Policy
from jaxalign.training.step import compile_step, initial_state
from tests.online.world import CONFIG, END, PROMPT, Tokenizer, World
from tests.slow import slow

WORLD = World(2)


def prompts_of(number, weight=1.0):
    return PromptBatch(
        tokens=np.tile(np.int32([0, *PROMPT]), (number, 1)),
        length=np.full(number, len(PROMPT), np.int32),
        record_index=np.zeros(number, np.int32),
        weight=np.full(number, weight, np.float32),
    )


def online(
    name,
    *,
    annotator=WORLD,
    mesh=None,
    config=CONFIG,
    start=WORLD.params,
    optimizer=None,
    record=None,
    **options,
):
    """A step, its first state and what is frozen."""
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    algorithm = ALGORITHMS[name](**options)
    policy = Policy(config=config)
    optimizer = with_history(algorithm, optax.adam(1e-2) if optimizer is None else optimizer)
    params = start
    if algorithm.advantages is not None:
        params = params | {"score": {"kernel": jnp.zeros((CONFIG.width, 1))}}
    state = place(initial_state(params, optimizer, seed=0), mesh)
    objective = OnlineObjective(policy=policy, algorithm=algorithm)
    how = {"objective": objective, "optimizer": optimizer, "micro_batches": 1}
    update = functools.partial(update_step, **how)
    step = OnlineStep(
        responses=[np.int32([2, END])],
        algorithm=algorithm,
        policy=policy,
        sampler=Sampler(
            config=config,
            tokenizer=Tokenizer(),
            sampling=Sampling(max_tokens=2, end_tokens=(END,)),
            mesh=mesh,
        ),
        annotator=annotator,
        update=compile_step(update, state, mesh),
        reshard=lambda policies: policies,
        prompt_texts=["dc"],
        mesh=mesh,
        key=jax.random.key(3),
        record=record or (lambda *_: None),
    )
    return step, state, {"policy": None, "reference": place(start, mesh)}


def run(step, state, frozen, *, steps, number=16):
    lines = []
    for _ in range(steps):
        state, metrics = step(state, frozen, prompts_of(number))
        lines.append({k: float(getattr(v, "value", lambda v=v: v)()) for k, v in metrics.items()})
    return state, lines


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_moves_the_policy_and_says_finite_things(name):
    step, state, frozen = online(name)
    after, lines = run(step, state, frozen, steps=2)
    assert int(after.step) == 2
    for line in lines:
        assert all(np.isfinite(value) for value in line.values()), line
        assert line["finite"] == 1
        assert sum(line[f"time/{part}"] for part in ("sampling", "annotation", "update")) == (
            pytest.approx(1)
        )
    kernel = after.params["layers"]["q"]["kernel"]
    assert np.abs(np.asarray(kernel - WORLD.params["layers"]["q"]["kernel"])).max() > 1e-4


def test_the_seed_decides_everything():
    first, again = (run(*online("ipo_md"), steps=3) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first[0]), jax.tree.leaves(again[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sampled_log_probs_are_what_the_update_scores():
    """At any temperature, and before an update the ratio of PPO is 1 everywhere."""
    config = tempered(dataclasses.replace(CONFIG, logit_softcap=3.0), 0.7)
    step, state, frozen = online("ppo", config=config)
    policies = policies_of(step.policy, state, frozen)
    sampled = step.sampler(
        policies, {"policy": 1.0, "reference": 0.0}, prompts_of(8), jax.random.key(0), samples=1
    )
    nothing = Annotated(reward=np.zeros((8, 1)))
    batch = jax.tree.map(jnp.asarray, rollout_batch(prompts_of(8), sampled, nothing))
    objective = OnlineObjective(policy=step.policy, algorithm=step.algorithm)
    outputs = objective.forward(state.params, frozen, batch, None)
    np.testing.assert_allclose(outputs.log_prob, sampled.log_prob["policy"], atol=1e-5)
    np.testing.assert_allclose(outputs.reference, sampled.log_prob["reference"], atol=1e-5)


@pytest.mark.parametrize("name", ["ppo", slow("rloo"), slow("regularised_policy_gradient")])
def test_a_reward_is_climbed(name):
    step, state, frozen = online(name)
    reward = WORLD.rewards(None, WORLD.names)
    before = WORLD.policy(WORLD.params) @ reward
    state, _ = run(step, state, frozen, steps=15, number=64)
    params = {key: tree for key, tree in state.params.items() if key != "score"}
    assert WORLD.policy(params) @ reward > before + 0.3


@pytest.mark.parametrize("axes", [slow({"data": 8}), {"fsdp": 4, "tensor": 2}])
def test_a_mesh_makes_the_same_updates(axes):
    mesh = make_mesh(**({"data": 1} | axes))
    rule = optax.sgd(0.1)
    alone, _ = run(*online("ipo_md", optimizer=rule), steps=2)
    shared, _ = run(*online("ipo_md", optimizer=rule, mesh=mesh), steps=2)
    for one, other in zip(
        jax.tree.leaves(alone.params), jax.tree.leaves(shared.params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


class Moody:
    """Has no verdict on some responses."""

    def __init__(self, on):
        self.on = on

    def preferences(self, prompts, first, second):
        said = WORLD.preferences(prompts, first, second).preference
        silent = [self.on(x) or self.on(y) for x, y in zip(first, second, strict=True)]
        return Verdicts(
            preference=np.where(silent, np.nan, said),
            reasons=tuple("in no mood" if one else "" for one in silent),
        )


def test_a_prompt_without_a_verdict_weighs_nothing_and_is_counted():
    step, state, frozen = online("online_ipo", annotator=Moody(lambda text: not text))
    key = jax.random.fold_in(jax.random.fold_in(step.key, 0), 0)
    drawn = step.sampler(
        policies_of(step.policy, state, frozen), {"policy": 1.0}, prompts_of(16), key, samples=2
    )
    silent = np.mean(["" in row for row in drawn.texts])
    assert 0 < silent < 1
    _, lines = run(step, state, frozen, steps=1)
    assert lines[0]["annotation/failed"] == pytest.approx(silent)
    assert lines[0]["skipped"] == 0


def test_no_verdict_at_all_stops_and_keeps_what_was_sampled(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    step, state, frozen = online(
        "online_ipo", annotator=Moody(lambda text: True), record=TextRecorder(path, prompts=1)
    )
    with pytest.raises(UserError, match=r"16 prompts of step 1 \(16: in no mood\)"):
        run(step, state, frozen, steps=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 16
    assert lines[0]["preference"] == [[0.5, None], [None, 0.5]]
    assert lines[0]["reason"] == "in no mood"


def test_samples_are_kept_where_the_annotator_fails_altogether(tmp_path):
    class Down:
        def preferences(self, prompts, first, second):
            raise UserError("http://judge: it cannot be reached")

    path = tmp_path / "rollouts.jsonl"
    record = TextRecorder(path, prompts=1)
    step, state, frozen = online("online_ipo", annotator=Down(), record=record)
    with pytest.raises(UserError, match="cannot be reached"):
        run(step, state, frozen, steps=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 16
    assert {line["reason"] for line in lines} == {"http://judge: it cannot be reached"}
    assert all(set(text) <= set("abcd") for line in lines for text in line["responses"])


def test_a_reward_that_is_no_number_is_counted_and_weighs_nothing():
    class Half:
        def rewards(self, prompts, responses):
            return np.array([np.nan if len(text) < 2 else 1.0 for text in responses])

    step, state, frozen = online("rloo", annotator=Half())
    state, lines = run(step, state, frozen, steps=1)
    assert 0 < lines[0]["annotation/failed"] < 1
    assert lines[0]["finite"] == 1
    assert lines[0]["rollout/reward"] == 1.0


def test_comparisons_do_not_do_where_rewards_are_needed():
    step, state, frozen = online("rloo", annotator=Moody(lambda text: False))
    with pytest.raises(UserError, match="gives no rewards"):
        run(step, state, frozen, steps=1)


def test_a_damaged_line_of_recorded_texts_is_named_and_kept(tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"step": 1}\n{"step": \x00\n{"step": 2}\n{"step": 3}\n')
    TextRecorder(path, prompts=1).rewind(2)
    assert path.read_text() == '{"step": 1}\n{"step": \x00\n{"step": 2}\n'
    assert "rollouts.jsonl:2: not a line of rollouts" in capsys.readouterr().err


def test_recorded_texts_go_back_with_the_run(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    recorder = TextRecorder(path, prompts=1)
    step, state, frozen = online("online_ipo", record=recorder)
    run(step, state, frozen, steps=3)
    with path.open("a") as file:
        file.write('{"step": 3, "pro')  # a kill cut it short
    recorder.rewind(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_average_of_parameters_is_the_sum_by_hand():
    step, state, frozen = online("nash_ema_pg", decay=0.75)
    expected = np.asarray(WORLD.params["embed"]["embedding"])
    for _ in range(3):
        state, _ = step(state, frozen, prompts_of(8))
        now = np.asarray(state.params["embed"]["embedding"])
        expected = 0.75 * expected + 0.25 * now
    average = policies_of(step.policy, state, frozen)["average"]
    np.testing.assert_allclose(average["embed"]["embedding"], expected, atol=1e-6)
    assert np.abs(expected - now).max() > 1e-4


def test_an_iterations_reference_is_the_policy_that_began_it():
    step, state, frozen = online("sppo", samples=2, iteration=2)

    def of(policies, name):
        return np.asarray(policies[name]["embed"]["embedding"])

    begun = []
    for _ in range(4):
        policies = policies_of(step.policy, state, frozen)
        begun.append((of(policies, "previous"), of(policies, "policy")))
        state, metrics = step(state, frozen, prompts_of(8))
        # first policy and reference are one, after an update they are not
        assert (abs(metrics["log_ratio"].value()) < 1e-6) == (len(begun) % 2 == 1)
    np.testing.assert_array_equal(begun[0][0], WORLD.params["embed"]["embedding"])
    np.testing.assert_array_equal(begun[1][0], begun[0][1])
    np.testing.assert_allclose(begun[2][0], begun[2][1], atol=1e-7)  # of two sums one is fused
    np.testing.assert_array_equal(begun[3][0], begun[2][0])
    assert np.abs(begun[2][0] - begun[0][0]).max() > 1e-4


def test_the_datas_response_is_one_of_the_pair(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    record = TextRecorder(path, prompts=2)
    step, state, frozen = online("spin", record=record, annotator=None, iteration=5)
    before = WORLD.policy(WORLD.params)
    for _ in range(10):
        state, metrics = step(state, frozen, prompts_of(32))
        assert not any(name.startswith("rollout/preference") for name in metrics)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["responses"][0] for line in lines} == {"c"}  # the letters before its end
    assert len({line["responses"][1] for line in lines}) > 3
    assert not any("preference" in line or "reward" in line for line in lines)
    at = WORLD.responses.index((2, END))
    assert WORLD.policy(state.params)[at] > before[at] + 0.15


def test_what_is_longer_than_a_response_may_be_is_cut_and_unfinished():
    step, *_ = online("spin")
    most = step.sampler.sampling.max_tokens
    long = np.arange(most + 3, dtype=np.int32) % 4
    found = from_data(prompts_of(2), [long], step.sampler)
    assert found.length.tolist() == [[most], [most]]
    assert found.tokens[0, 0].tolist() == long[:most].tolist()
    assert not found.finished.any()


def test_minibatches_are_all_of_a_rollout_in_parts():
    """To first order in the rate their updates add up to as many of the whole."""
    step, state, frozen = online("ppo", minibatches=4, updates=1)
    drawn = step.sampler(
        policies_of(step.policy, state, frozen),
        {"policy": 1.0, "reference": 0.0},
        prompts_of(16),
        jax.random.key(0),
        samples=1,
    )
    drawn = dataclasses.replace(drawn, length=np.full_like(drawn.length, 2))  # all weigh the same
    said = Annotated(reward=np.arange(16.0)[:, None])
    batch = jax.tree.map(jnp.asarray, rollout_batch(prompts_of(16), drawn, said))

    def moved(**options):
        algorithm = ALGORITHMS["ppo"](**options)
        objective = OnlineObjective(policy=step.policy, algorithm=algorithm)
        rule = optax.sgd(optax.polynomial_schedule(1e-4, 2e-4, 1, 100))  # its count is the updates
        start = initial_state(state.params, rule, seed=0)
        run = functools.partial(update_step, objective=objective, optimizer=rule, micro_batches=1)
        after, _ = jax.jit(run)(start, frozen, batch)
        [count] = [x for x in jax.tree.leaves(after.opt_state) if x.dtype == jnp.int32]
        change = jax.tree.map(lambda x, y: np.asarray(x - y), after.params, start.params)
        return int(after.step), int(count), change

    whole_step, whole_count, whole = moved(updates=1)
    step_of, count, parts = moved(updates=1, minibatches=4)
    assert (whole_step, whole_count, step_of, count) == (1, 1, 1, 4)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(whole))
    rates = np.mean([1.0, 1.01, 1.02, 1.03]) * 4
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, rates * one, atol=0.02 * scale)


def test_a_response_that_was_cut_off_pays_for_it():
    sampled = Sampled(
        tokens=np.ones((2, 2, 1), int),
        length=np.ones((2, 2), int),
        finished=np.array([[True, False], [True, True]]),
        log_prob={},
        texts=[["a", "b"], ["c", "d"]],
    )
    said = Annotated(reward=np.array([[1.0, 2.0], [3.0, 4.0]]))
    batch = rollout_batch(prompts_of(2), sampled, said, unfinished_penalty=0.5)
    assert batch.reward.tolist() == [[1.0, 1.5], [3.0, 4.0]]
    assert batch.baseline.tolist() == [[1.5, 1.0], [4.0, 3.0]]


def test_rows_are_prompts_with_their_responses():
    prompts = PromptBatch(
        tokens=np.int32([[0, 5, 6], [7, 8, 9]]),
        length=np.int32([2, 3]),
        record_index=np.int32([4, 1]),
        weight=np.float32([1, 1]),
    )
    sampled = Sampled(
        tokens=np.int32([[[1, 2, 0], [3, 0, 0]], [[4, 4, 4], [2, 2, 0]]]),
        length=np.int32([[2, 1], [3, 2]]),
        finished=np.ones((2, 2), bool),
        log_prob={},
        texts=[["x", "y"], ["z", "w"]],
    )
    said = Annotated(
        preference=np.array([[[0.5, 0.8], [0.2, 0.5]], [[0.5, np.nan], [np.nan, 0.5]]]),
    )
    batch = rollout_batch(prompts, sampled, said)
    assert batch.responses.tokens[:, :, :6].tolist() == [
        [[5, 6, 1, 2, 0, 0], [5, 6, 3, 0, 0, 0]],
        [[7, 8, 9, 4, 4, 4], [7, 8, 9, 2, 2, 0]],
    ]
    assert batch.responses.prompt_length.tolist() == [[2, 2], [3, 3]]
    assert batch.responses.weight.tolist() == [1.0, 0.0]
    assert np.isfinite(batch.preference).all()


def test_baselines_are_means_of_others():
    rewards = np.array([[1.0, 4.0], [2.0, 8.0]])
    assert baselines(rewards, np.ones(2)).tolist() == [[4.0, 1.0], [8.0, 2.0]]
    single = np.array([[1.0], [2.0], [6.0], [50.0]])
    found = baselines(single, np.array([1.0, 1.0, 1.0, 0.0]))
    assert found[:3].tolist() == [[4.0], [3.5], [1.5]]


def test_equal_draws_are_drawn_together_and_joined_in_order():
    assert [number for _, number in draws_of(ALGORITHMS["ipo_md"]())] == [2]
    assert [number for _, number in draws_of(ALGORITHMS["nash_md_pg"]())] == [1, 1]
    shape = {"finished": np.ones((1, 1), bool), "length": np.ones((1, 1), int)}
    part = functools.partial(Sampled, **shape)
    ones = np.ones((1, 1, 1))
    first = part(tokens=ones.astype(int), log_prob={"policy": ones}, texts=[["a"]])
    second = part(tokens=0 * ones.astype(int), log_prob={"reference": ones}, texts=[["b"]])
    whole = joined([first, second])
    assert whole.texts == [["a", "b"]]
    assert whole.tokens[0, :, 0].tolist() == [1, 0]
    assert whole.log_prob == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("online_ipo", {}), ("ipo_md", {"beta": 0.25})])
def test_samples_find_the_equilibrium(optimised, name, options):
    """The whole loop, sampling included, comes within 0.01 nats of its policy of theory.

    From other seeds so small a network has plateaus, under exact gradients, too.
    """
    steps, tau, world = 200, 0.1, World(2, seed=1)
    rule = optax.chain(
        optax.scale_by_rms(decay=0.99),
        optax.scale_by_learning_rate(optax.linear_schedule(5e-3, 0.0, steps)),
    )
    step, state, frozen = online(name, optimizer=rule, start=world.params, tau=tau, **options)
    target = world.target(tau, options.get("beta", 0.0))
    if not options:
        nash = equilibrium(world.win, world.policy(world.params), tau)
        np.testing.assert_allclose(target, nash, atol=1e-8)
    assert divergence(target, world.policy(world.params)) > 0.1
    state, _ = run(step, state, frozen, steps=steps, number=512)
    assert divergence(target, world.policy(state.params)) < 0.01


def test_an_encoder_decoder_is_sampled_scored_and_trained():
    config = EncoderDecoderConfig(
        vocab_size=4,
        width=16,
        layers=1,
        decoder_layers=2,
        heads=2,
        head_width=8,
        mlp_width=32,
    )
    params = encoder_decoder.init_params(config, jax.random.key(0))
    step, state, frozen = online("ipo_md", config=config, start=params, beta=0.5)
    objective = OnlineObjective(policy=step.policy, algorithm=step.algorithm)
    mixed = {"policy": 0.5, "reference": 0.5}
    drawn = step.sampler(
        policies_of(step.policy, state, frozen), mixed, prompts_of(8), jax.random.key(0), samples=2
    )
    said = Annotated(preference=np.full((8, 2, 2), 0.5))
    batch = jax.tree.map(jnp.asarray, rollout_batch(prompts_of(8), drawn, said))
    outputs = objective.forward(state.params, frozen, batch, None)
    np.testing.assert_allclose(outputs.log_prob, drawn.log_prob["policy"], atol=1e-5)
    state, lines = run(step, state, frozen, steps=2)
    assert lines[-1]["finite"] == 1
    assert lines[-1]["log_ratio"] != 0
