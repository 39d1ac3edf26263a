"""Runs that advance in one program are the runs that the library makes one by one."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ipo_md import small_tables
from experiments.ipo_md.small_data import cut, in_turn
from experiments.ipo_md.together import Method, Runs, annotations, order
from jaxalign.generation import generate
from jaxalign.losses import PairLogProbs, ipo
from jaxalign.models.lora import merge
from jaxalign.online import OnlineObjective
from jaxalign.online.step import update_step
from jaxalign.training.metrics import to_floats
from jaxalign.training.objectives import Policy
from tests.online.world import CONFIG, END, PROMPT, Tokenizer, World

MOST, STRENGTHS, SEEDS, RATE = 2, (0.1, 1.0), (0, 5), 0.01
OPTIONS = {
    "ipo_md": ("tau", {"beta": 0.125}),
    "egpo": ("tau", {}),
    "grpo": ("beta", {"samples": 4}),
}


@functools.cache
def runs_of(name, at_once):
    parameter, options = OPTIONS[name]
    world = World(MOST)
    letters: Any = Tokenizer()
    runs = Runs(
        Method(name=name, parameter=parameter, options=options, rate=RATE),
        world.params,
        CONFIG,
        letters,
        ends=[END],
        prompts=4,
        longest=3,
        tokens=MOST,
        rank=2,
        at_once=at_once,
    )
    return world, runs


class Prompts:
    """The same prompt, again and again, as tokenised rows."""

    length = np.full(6, len(PROMPT))

    def __getitem__(self, at):
        return np.array(PROMPT)


def one_update(name, at_once=True):
    world, runs = runs_of(name, at_once)
    state = runs.begin(SEEDS)
    prompts: Any = Prompts()
    batches = [runs.batch(prompts, np.arange(4)), runs.batch(prompts, np.arange(2, 6))]
    sampled = runs.draw(state, batches, SEEDS, 3)
    verdicts = annotations(world, runs.plain, [["p"] * 4] * 2, sampled)
    return world, runs, state, batches, sampled, runs.rollouts(batches, sampled, verdicts)


@pytest.mark.parametrize(
    ("name", "at_once"),
    [
        ("ipo_md", True),
        ("ipo_md", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("egpo", "grpo")),
    ],
)
def test_an_update_together_is_the_updates_one_by_one(name, at_once):
    world, runs, state, *_, rollouts = one_update(name, at_once)
    assert (rollouts.responses.joint_tokens is None) == at_once
    alone = [jax.tree.map(lambda x, at=at: jnp.array(x[at]), (state, rollouts)) for at in range(2)]
    after, metrics = runs.update(state, rollouts, STRENGTHS, RATE)
    optimizer = runs._optimizer(RATE)
    for at, (own, batch) in enumerate(alone):
        objective = OnlineObjective(
            policy=Policy(config=CONFIG, adapter_scale=2.0),
            algorithm=runs.method.algorithm(STRENGTHS[at]),
            max_tokens=MOST,
        )
        frozen = {"policy": world.params, "reference": world.params}
        apart = dataclasses.replace(batch, responses=batch.responses.apart())
        step = functools.partial(update_step, objective=objective, optimizer=optimizer)
        expected, known = jax.jit(functools.partial(step, micro_batches=1))(own, frozen, apart)
        known = to_floats(known)
        assert metrics[at]["loss"] == pytest.approx(known["loss"], rel=1e-5)
        assert metrics[at]["grad_norm"] == pytest.approx(known["grad_norm"], rel=1e-4)
        moved = jax.tree.map(lambda x, at=at: x[at], after)
        gaps = jax.tree.map(lambda x, y: jnp.abs(x - y).mean(), moved.params, expected.params)
        assert max(map(float, jax.tree.leaves(gaps))) < 1e-3 * RATE
    if name != "grpo":  # whose divergence is 0 at the reference
        assert metrics[0]["loss"] != metrics[1]["loss"]


def test_a_runs_samples_are_its_own_whatever_the_other_runs_are():
    world, runs, state, batches, sampled, _ = one_update("ipo_md")
    for at, seed in enumerate(SEEDS):
        adapters = jax.tree.map(lambda x, at=at: x[at], state.params)
        alone = generate(
            [merge(world.params, adapters, 2.0), world.params],
            CONFIG,
            jnp.asarray(batches[at].tokens),
            jnp.asarray(batches[at].length),
            jax.random.fold_in(jax.random.key(seed), 64 * 3),
            sampling=runs._sampling,
            weights=(0.875, 0.125),
            samples=2,
        )
        assert np.array_equal(sampled[at].tokens.reshape(-1, MOST), alone.tokens)
        assert np.array_equal(sampled[at].length.ravel(), alone.length)
    assert not np.array_equal(sampled[0].tokens, sampled[1].tokens)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
def test_divergences_are_the_log_ratios_of_the_exact_policies(at_once):
    world, runs, state, batches, sampled, rollouts = one_update("egpo", at_once)
    assert np.abs(runs.divergences(batches, sampled)).max() < 1e-5
    after, _ = runs.update(state, rollouts, STRENGTHS, 0.1)
    sampled = runs.of_policy(after, batches, SEEDS, 4)
    found = runs.divergences(batches, sampled)  # of the two that the loss reads
    before = world.log_probs(world.params).sum(-1)
    for at in range(2):
        adapters = jax.tree.map(lambda x, at=at: x[at], after.params)
        ratio = world.log_probs(merge(world.params, adapters, 2.0)).sum(-1) - before
        known = [[ratio[world.names.index(x)] for x in row[:2]] for row in sampled[at].texts]
        assert found[at] == pytest.approx(np.array(known), abs=1e-4)


def test_a_traced_strength_is_the_number_and_is_not_checked():
    numbers: dict[str, Any] = {
        name: jnp.array([value])
        for name, value in (
            *(("chosen", -3.0), ("rejected", -4.0), ("reference_chosen", -3.5)),
            *(("reference_rejected", -3.0), ("chosen_length", 3), ("rejected_length", 2)),
        )
    }
    pairs = PairLogProbs(**numbers)
    traced = jax.jit(lambda tau: ipo(pairs, tau=tau))
    assert float(traced(0.2)[0]) == pytest.approx((1.5 - 2.5) ** 2)


def test_prompts_come_once_in_an_epoch():
    rows = order(0, 10, 4, 5)
    assert rows.shape == (5, 4)
    assert sorted(rows.ravel()[:10]) == list(range(10))
    assert in_turn([[{"a": "1"}, {"a": "2"}], [{"a": "3"}]]) == [{"a": "1"}, {"a": "3"}, {"a": "2"}]


def test_long_responses_are_cut_at_a_token():
    class Words:
        def encode(self, text, add_special_tokens):
            return text.split(" ")

        def decode(self, tokens, **options):
            return " ".join(tokens)

    words: Any = Words()
    assert cut("one two three", words, 2) == "one two"
    assert cut(" one two ", words, 5) == "one two"


def test_tables_from_rows_alone(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()

    def write(name, lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (rows / f"{name}.jsonl").write_text(text)

    point = {"reward": 1.0, **{f"wins/{x}": 0.6 for x in ("reward", "preference", "judge")}}
    curve = [{"update": at, "kl": at / 2, "length": 9.0, **point} for at in (0, 4)]
    names = ("ipo_md", "grpo")
    for name in names:
        run = {"algorithm": name, "parameter": "tau", "seed": 0, "updates": 4, "curve": curve}
        write(f"sweep_{name}", [run | {"strength": x} for x in (0.1, 1.0)])
        write(f"final_{name}", [run | {"strength": 0.1, "seed": seed} for seed in range(2)])
    for name in (*names, "reference"):
        own = {"policy": name, "response": "yes", "tokens": 3, "finished": True, "log_ratio": 0.5}
        lines = [own | {"seed": seed, "prompt": at} for seed in range(2) for at in range(4)]
        write(f"responses_{name}", lines)
    verdicts = [
        {"annotator": annotator, "one": one, "other": other, "seed": seed, "preference": p}
        for annotator in small_tables.ANNOTATORS
        for one, other, p in (
            ("ipo_md", "grpo", [0.9, 0.6, 0.51, 0.4]),
            ("ipo_md", "reference", [0.9 if annotator == "judge" else 0.51] * 4),
            ("grpo", "reference", [0.6, 0.4, 0.5, 0.5]),
        )
        for seed in range(2)
        if annotator == "judge" or other == "reference"
    ]
    sections = ("small methods", "small all against all", "small annotators", "small sweep")
    page = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in sections)
    (tmp_path / "README.md").write_text(page)
    assert "own annotator" in small_tables.write(rows, tmp_path)  # the sweep's rows alone
    write("judge", verdicts)
    one = {"pairs": 4, "accuracy": 0.75, "longer": 0.5, "error": 0.1}
    one["preference"] = [0.9, 0.8, 0.7, 0.4]
    for name in small_tables.ANNOTATORS:
        write(f"annotator_{name}", [one | {"source": x} for x in small_tables.SOURCES])
    found, games = small_tables.games_of(verdicts)
    assert found == ["ipo_md", "grpo", "reference"]
    assert games[:, 0, 1].T.tolist() == [[1, 1, 1, 0]] * 2
    assert games[:, 1, 0].T.tolist() == [[0, 0, 0, 1]] * 2
    assert np.all(games[:, 0, 0] == 0.5)
    text = small_tables.write(rows, tmp_path)
    assert "| IPO-MD | tau = 0.1 | 1.00 ± 0.00 |" in text
    assert "| +0.00 ± 0.00 | 0.5 | 3.0 | 1.00 |" in text
    assert "| GRPO | 0.25 ± 0.80 | 0.50 | 0.50 ± 0.65 |" in text
    assert text.index("| IPO-MD | tau") < text.index("| GRPO | tau") < text.index("| reference | –")
    assert "1.00 ± 0.00" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "small.png").exists()


def test_a_factor_on_log_odds_makes_verdicts_frequencies():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=20_000)
    right = rng.uniform(size=odds.size) < 1 / (1 + np.exp(-odds))
    bold = 1 / (1 + np.exp(-4 * np.where(right, odds, -odds)))  # of the preferred response
    assert small_tables.temperature(bold) == pytest.approx(0.25, rel=0.1)
    assert small_tables.calibrated_error(bold) < 0.02
