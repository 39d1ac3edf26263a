"""Plans against the runs that they are of: the same program, the same memory, batches within."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from jaxalign.config import (
    AlignmentConfig,
    ArchitectureConfig,
    EntanglementConfig,
    LoraConfig,
    MeshConfig,
    PreferenceConfig,
    RolloutConfig,
    TrainConfig,
    with_fields,
)
from jaxalign.data.embedded import embedded_tokenizer
from jaxalign.errors import UserError
from jaxalign.models import init_model, save_pretrained
from jaxalign.planning.compiled import step_memory
from jaxalign.planning.plans import draft
from jaxalign.runs.train import train
from jaxalign.sharding.structs import bytes_on_device, placed_batch
from jaxalign.stages import NAMES, run
from jaxalign.stages.models import embedded_config
from jaxalign.training.ledger import HELD_OUT

RULES = "def short(prompt, response):\n    return -len(response)\n"
STAGE = {"steps": 1, "batch_size": 16, "micro_batches": 2}
PREFERENCE = PreferenceConfig(**STAGE)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def config(**fields):
    wanted = {
        "architecture": ArchitectureConfig(
            width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, context=128
        ),
        "max_length": 96,
        "max_eval_records": 16,
        "mesh": MESH,
        # a plan is of padded rows: packed ones depend on the data's lengths
        **dict.fromkeys(("packing", *(f"{stage}.packing" for stage in PACKED)), "never"),
        "export": False,
        "rollout": RolloutConfig(
            prompts="prompts.jsonl",
            annotator="rule:rules.py:short",
            max_prompt_length=24,
            max_tokens=16,
            max_eval_prompts=0,
        ),
        "alignment": AlignmentConfig(positive="Be kind.", negative="Be rude.", positions=8),
    }
    return with_fields(TrainConfig(), **wanted | fields)


PACKED = ("sft", "feedback", "representation")


def with_stage(name):
    """The field of a stage, with its length."""
    return {f"{name}.{field}": value for field, value in STAGE.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    rows = [json.dumps({"prompt": f"Say {number} words."}) for number in range(32)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def programs_of(config, monkeypatch):
    """What a run's stages compile: (shapes of the first step's arguments, temporaries)."""
    found = []

    def watched(step, state, mesh):
        compiled, seen = step_compiler(step, state, mesh), []

        def measured(*arguments):
            if not seen:
                program = compiled.lower(*arguments).compile()
                seen.append(program.memory_analysis().temp_size_in_bytes)
                shapes = [jax.tree.map(as_struct, tree) for tree in arguments]
                found.append((shapes, [on_device(tree) for tree in arguments], seen[0]))
            return compiled(*arguments)

        return measured

    step_compiler = run.compile_step
    monkeypatch.setattr(run, "compile_step", watched)
    train(config)
    return found


def as_struct(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def on_device(tree):
    """Bytes on the first device; an array that lies in the tree twice counts once."""
    arrays = {id(x): x for x in jax.tree.leaves(tree)}.values()
    return sum(x.addressable_shards[0].data.nbytes for x in arrays)


def check(config, monkeypatch):
    """Every stage's plan is of the program that the run compiled."""
    stages = [name for name in NAMES if getattr(config, name).steps]
    for name, (shapes, sizes, temporaries) in zip(
        stages, programs_of(config, monkeypatch), strict=True
    ):
        planned, (state, frozen, batch) = draft(config, "cpu:8", name), shapes
        assert jax.tree.map(as_struct, planned.state) == state, name
        lasting = planned.lasting
        kept = lasting["parameters"] + lasting["optimizer"]
        assert 0 <= sizes[0] - kept < 64, name  # counters and a key
        seen = planned.frozen
        if HELD_OUT in seen:
            seen = {**seen, HELD_OUT: placed_batch(frozen[HELD_OUT], planned.mesh)}
        assert lasting["frozen"] >= bytes_on_device(seen) == sizes[1], name
        assert jax.tree.structure(planned.batch) == jax.tree.structure(batch), name
        for most, real in zip(jax.tree.leaves(planned.batch), jax.tree.leaves(batch), strict=True):
            assert most.dtype == real.dtype
            assert all(a >= b for a, b in zip(most.shape, real.shape, strict=True)), name
        real = placed_batch(batch, planned.mesh)
        used = step_memory(planned.step, planned.state, seen, real, planned.mesh)
        assert used["temporaries"] == temporaries, name


def test_a_plan_is_of_the_program_that_runs(here, monkeypatch):
    check(config(preference=PREFERENCE), monkeypatch)


@pytest.mark.parametrize("every", [0, 1])
def test_a_plan_of_packed_rows_is_of_the_program_that_packs(here, monkeypatch, every):
    probes = EntanglementConfig(every=every)
    preference = dataclasses.replace(PREFERENCE, packing="always", entanglement=probes)
    run = config(preference=preference, packing="always")
    [((state, _, batch), _, temporaries)] = programs_of(run, monkeypatch)
    packed = batch.pairs.packed
    assert packed.tokens.shape[0] == 8  # two micro-batches on four shards, with two pairs each
    mean = -(-packed.tokens.shape[1] // 2)
    planned = draft(run, "cpu:8", "preference", example_tokens=mean)
    assert jax.tree.map(as_struct, planned.state) == state
    most, real = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (planned.batch, batch))
    assert most.keys() == real.keys()
    assert any("packed_apart" in str(path) for path in most) == (every > 0)
    for path, x in most.items():
        assert x.dtype == real[path].dtype
        assert all(a >= b for a, b in zip(x.shape, real[path].shape, strict=True)), path
    read = planned.batch.pairs.packed_apart if every else planned.batch.pairs.packed
    [one] = planned.passes
    assert (one.rows, one.length) == read.tokens.shape
    real = placed_batch(batch, planned.mesh)
    used = step_memory(planned.step, planned.state, planned.frozen, real, planned.mesh)
    assert used["temporaries"] == temporaries


def test_what_is_not_packed_is_not_planned_packed():
    for name in ("pretrain", "online", "representation"):
        run = config(**with_stage(name), text=("text.jsonl",))
        with pytest.raises(UserError, match=f"packed rows of {name} are not planned"):
            draft(run, "cpu:8", name, example_tokens=64)


@pytest.mark.slow
def test_every_stage_is_planned_as_it_runs(here, monkeypatch):
    embedded_tokenizer().save_pretrained("tokenizer")
    text = [{"text": "The sky is blue. " * 20}] * 40
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    stages = {name: value for stage in NAMES for name, value in with_stage(stage).items()}
    check(config(tokenizer="tokenizer", text=("text.jsonl",), **stages), monkeypatch)


VARIANTS = {
    "adapters, reference known, a batch statistic": {
        **with_stage("preference"),
        "lora": LoraConfig(rank=2, dropout=0.1),
        "reference": "precomputed",
        "loss": "kto",
    },
    "learned mask, every pair watched": {
        **with_stage("preference"),
        "entanglement": EntanglementConfig(
            every=1, realised=True, reweighting="normalised", mask="learned"
        ),
    },
    "ledger of every step": {
        **with_stage("preference"),
        "entanglement": EntanglementConfig(ledger=1),
    },
    "reward model with adapters": {
        **with_stage("preference"),
        "loss": "bradley_terry",
        "lora": LoraConfig(rank=2),
    },
    "two models read": {
        "model": "base",
        **with_stage("representation"),
        "alignment": AlignmentConfig(method="dual", negative_model="other"),
    },
    "critic, sampling on another mesh": {
        **with_stage("online"),
        "rollout": {"algorithm": "ppo", "mesh": {"data": 8}},
    },
    "running average, adapters, sampling on another mesh": {
        **with_stage("online"),
        "lora": LoraConfig(rank=2),
        "rollout": {"algorithm": "nash_ema_pg", "mesh": {"data": 8}},
    },
    "groups, several updates, tokens weighed": {
        **with_stage("online"),
        "lora": LoraConfig(rank=2),
        "rollout": {"algorithm": "grpo", "options": {"samples": 2.0, "updates": 2.0}, "top_p": 0.9},
    },
    "gradients of the responses to a prompt": {
        **with_stage("online"),
        "online.entanglement.every": 1,
        "online.entanglement.realised": True,
        "rollout": {"algorithm": "dr_grpo", "options": {"samples": 4.0}},
    },
    "two references": {
        **with_stage("online"),
        "rollout": {"algorithm": "inpo"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_kind_of_step_is_planned_as_it_runs(here, monkeypatch, fields):
    shape = embedded_config(config().architecture, len(tokenizer := embedded_tokenizer()))
    for seed, folder in enumerate(("base", "other")):
        save_pretrained(init_model(shape, jax.random.key(seed)), Path(folder), tokenizer=tokenizer)
    given = dict(fields)
    rollout = dataclasses.replace(config().online.rollout, **given.pop("rollout", {}))
    check(config(rollout=rollout, **given), monkeypatch)


def test_planned_bytes_are_those_of_the_parameters():
    shape = ArchitectureConfig(width=64, layers=2, heads=4, kv_heads=4, mlp_width=128)
    start = config(preference=PREFERENCE, architecture=shape, mesh=MeshConfig(fsdp=8))
    lasting = draft(start, "cpu:8", "preference").lasting
    matrices = 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)  # the embedding is tied
    vectors = 64 * (2 * 2 + 1)  # norms are whole everywhere
    assert lasting["parameters"] == 4 * (matrices // 8 + vectors)
    assert lasting["frozen"] == lasting["parameters"]
    assert lasting["optimizer"] == 2 * lasting["parameters"] + 8  # AdamW's moments, two counters
    adapted = dataclasses.replace(start, lora=LoraConfig(rank=3))
    adapted = draft(adapted, "cpu:8", "preference").lasting
    assert adapted["parameters"] == 4 * 2 * 3 * (4 * 2 * 64 + 3 * (64 + 128))  # in two layers
    assert adapted["frozen"] == lasting["parameters"]  # the reference is the same weights


@pytest.mark.parametrize("name", ["sft", "preference", "online"])
def test_an_encoder_decoder_is_planned(name):
    shape = Path(__file__).resolve().parents[2] / "tpu" / "shapes" / "t5-v1_1-large"
    large = config(model=str(shape), mesh=MeshConfig(fsdp=8), **with_stage(name))
    lasting = draft(large, "cpu:8", name, response=32).lasting
    assert lasting["parameters"] == pytest.approx(4 * 783_150_080 / 8, rel=2e-3)
    many = with_fields(large, **{f"{name}.micro_batches": 4})
    with pytest.raises(UserError, match="in 4 micro-batches is not a multiple"):
        draft(many, "cpu:8", name)
