"""The Python door: what a notebook holds does what the commands do."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxalign
from jaxalign.config import MeshConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.entanglement.measurements import measure
from jaxalign.entanglement.reweighting import normalised
from jaxalign.errors import UserError
from jaxalign.losses import Divergence, Switches
from jaxalign.sharding import make_mesh
from jaxalign.training.optimizers import make_optimizer
from tests.tiny_model import save_tiny_model

RECORDS = [
    {"prompt": f"Say {n}", "chosen": f"{n} it is", "rejected": "no " * (n % 3 + 1)}
    for n in range(12)
]


def hinge(pairs, *, beta=0.1):
    return jax.nn.relu(1 - beta * pairs.margin)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    save_tiny_model(folder / "model")
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "pairs.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return jaxalign.load(folder / "model", batch_size=4)


def test_a_model_answers_and_other_parameters_answer_otherwise(model):
    [[first], [second]] = model.generate(["Say 1", "Say 2"], max_tokens=5)
    assert model.generate(["Say 1"], max_tokens=5, samples=2) == [[first, first]]
    moved = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)),
                         model.model.params)  # fmt: skip
    other = model.with_params(moved).generate(["Say 1", "Say 2"], max_tokens=5)
    assert other != [[first], [second]]
    with pytest.raises(UserError, match="max_tokens: 0 is not positive"):
        model.generate(["Say 1"], max_tokens=0)


def test_log_probs_are_those_of_the_scored_text(model):
    """`LocalModel.score` sums the same tokens but the end token, read off a pass of their own."""
    pairs = model.log_probs(RECORDS[:5])
    np.testing.assert_allclose(pairs.chosen, pairs.reference_chosen)
    prompts = [record["prompt"] for record in RECORDS[:5]]
    scored = model.backend.score(prompts, [record["chosen"] for record in RECORDS[:5]])
    assert [int(n) for n in pairs.chosen_length] == [one.tokens + 1 for one in scored]
    assert all(p < s.log_prob for p, s in zip(pairs.chosen, scored, strict=True))
    moved = model.with_params(jax.tree.map(lambda x: 1.1 * x, model.model.params))
    apart = model.log_probs(RECORDS[:5], reference=moved)
    np.testing.assert_allclose(apart.chosen, pairs.chosen)
    np.testing.assert_allclose(apart.reference_chosen, moved.log_probs(RECORDS[:5]).chosen)


def test_entanglement_of_a_loss_of_ones_own(model, folder):
    rows = model.entanglement(folder / "pairs.jsonl", loss=hinge)
    assert [row.chosen for row in rows] == [record["chosen"] for record in RECORDS]
    for row in rows:
        numbers = row.numbers
        cosine = numbers["inner"] / (numbers["norm_chosen"] * numbers["norm_rejected"])
        assert numbers["cosine"] == pytest.approx(cosine, rel=1e-4)
        assert (numbers["d_w"], numbers["d_l"]) == pytest.approx((0.1, 0.1))  # beta, in the hinge


@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_alone_is_the_step_of_a_run(model, folder, monkeypatch, parts):
    """Two steps in a notebook and in `jaxalign.train`: the same losses, rewards and norms."""
    monkeypatch.chdir(folder)
    rule = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    config = TrainConfig(
        name=f"run{parts}",
        model="model",
        data="pairs.jsonl",
        holdout=0.0,
        preference=PreferenceConfig(
            steps=2,
            batch_size=8,
            micro_batches=parts,
            optimizer=rule,
            reference="live",
            share_prompts="never",
            packing="never",
        ),
        max_length=60,
        mesh=MeshConfig(data=4 if parts == 2 else 8, fsdp=1, tensor=2 if parts == 2 else 1),
        export=False,
        seed=3,
    )
    run = jaxalign.train(config)
    optimizer = make_optimizer("adamw", lambda step: 1e-2, clip_norm=1.0)
    before = jax.tree.map(np.array, model.model.params)
    state, step = jaxalign.preference_step(
        model,
        jaxalign.api.dpo,
        optimizer,
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1),
                               ("data", "fsdp", "sequence", "tensor")),
        micro_batches=parts,
        per_pair=parts == 1,
        seed=3,
    )  # fmt: skip
    batches = model.batches("pairs.jsonl", batch_size=8, max_length=60, seed=3)
    lines = [line for line in run.lines if line["split"] == "train"]
    assert len(lines) == 2
    for line, batch in zip(lines, batches, strict=False):
        state, metrics = step(state, batch)
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert metrics[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name
    assert ("entanglement/cosine" in metrics) == (parts == 1)
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, before, model.model.params)  # as it was


def test_a_trained_state_writes_from_all_devices(model):
    """Its parameters lie on eight devices; the model's programs and end tokens serve them, too."""
    batches = model.batches(RECORDS, batch_size=8, max_length=60, buckets=1)
    state, step = jaxalign.preference_step(model, jaxalign.api.dpo, optax.sgd(1e-9))
    state, _ = step(state, next(batches))
    assert len(jax.tree.leaves(state.params)[0].devices()) == 8
    same = model.with_params(state.params)
    assert same.generate(["Say 1"], max_tokens=5) == model.generate(["Say 1"], max_tokens=5)
    assert same.backend._programs is model.backend._programs
    assert same.backend.identity != model.backend.identity
    np.testing.assert_allclose(
        same.log_probs(RECORDS, reference=model).margin, np.zeros(12), atol=1e-4
    )


def test_a_reweighting_leaves_every_pair_ideal(model):
    """Unit gradients: chosen up, rejected down, wherever the cosine is below 1 (section 5.1)."""
    batch = next(model.batches(RECORDS, batch_size=8, max_length=60, buckets=1))
    found = {}
    for name, reweighting in {"none": None, "normalised": normalised}.items():
        state, step = jaxalign.preference_step(
            model, jaxalign.api.dpo, optax.sgd(1e-3), per_pair=True, reweighting=reweighting
        )
        found[name] = step(state, batch)[1]
    assert found["normalised"]["loss"] == pytest.approx(found["none"]["loss"], rel=1e-6)
    assert found["normalised"]["entanglement/ideal"] == 1.0
    d_w = found["none"]["entanglement/d_w"]  # beta / 2 for all pairs at the start
    geometry = measure(model.tokenized(RECORDS, max_length=60), model.model)[0]
    chosen = np.asarray(geometry.chosen)[np.asarray(batch.record_index)]
    assert found["normalised"]["entanglement/d_w"] == pytest.approx(
        d_w * np.mean(chosen**-0.5), rel=1e-3
    )


def test_switches_of_a_step_do_not_depend_on_the_mesh(model):
    """All of them at once, on one device and on eight; each loss reads what they act on."""
    batch = next(model.batches(RECORDS, batch_size=8, max_length=60, buckets=1))
    switches = Switches(
        divergence=Divergence("jensen_shannon"),
        log_probs="mean",
        tail_weight=0.3,
        importance=True,
        calibration="head",
        logits_sam=0.1,
    )
    meshes = {
        "one": make_mesh(devices=jax.devices()[:1]),
        "eight": make_mesh(data=2, fsdp=2, tensor=2),
    }
    found = {}
    for name, mesh in meshes.items():
        state, step = jaxalign.preference_step(
            model, jaxalign.api.dpo, optax.sgd(1.0), mesh=mesh, switches=switches, micro_batches=2
        )
        state, _ = step(state, batch)
        found[name] = step(state, batch)[1]  # at parameters that are not the reference's
    for name in ("loss", "rewards/margins", "importance", "loss/shifted_head"):
        assert found["eight"][name] == pytest.approx(found["one"][name], rel=1e-3, abs=1e-6), name
    assert found["one"]["loss"] < np.log(2) * found["one"]["importance"]
    with pytest.raises(UserError, match="does not read the log-ratio"):
        jaxalign.preference_step(
            model,
            lambda pairs: pairs.rejected_mean - pairs.chosen_mean,
            optax.sgd(0.1),
            switches=Switches(divergence=Divergence("forward_kl")),
        )


def test_a_loss_that_is_none_is_refused(model):
    with pytest.raises(UserError, match="instead of one value per pair"):
        jaxalign.preference_step(model, lambda pairs: pairs.margin.mean(), optax.sgd(0.1))
    with pytest.raises(UserError, match="pair 2: no rejected"):
        model.log_probs([RECORDS[0], {"prompt": "a", "chosen": "b"}])
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = jaxalign.trian


@pytest.mark.parametrize(("page", "blocks"), [("README.md", 1), ("docs/guides/python.md", 2)])
def test_the_lines_of_the_pages_run(page, blocks, folder, monkeypatch):
    """As they stand, but for the model's name and the number of steps."""
    text = (Path(__file__).parents[1] / page).read_text()
    found = [x for x in re.findall(r"```python no-run\n(.*?)```", text, re.S) if "load(" in x]
    monkeypatch.chdir(folder)
    names = {"HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"}
    for block in found[:blocks]:
        small = re.sub("|".join(map(re.escape, names)), "model", block)
        exec(small.replace("range(100)", "range(2)"), {"__name__": page})
    assert len(found) >= blocks
