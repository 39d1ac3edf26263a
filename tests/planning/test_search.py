"""Sweeps against trying everything, remedies against what they promise."""

import dataclasses

import pytest

from jaxalign.config import (
    ArchitectureConfig,
    LoraConfig,
    MeshConfig,
    PreferenceConfig,
    TrainConfig,
)
from jaxalign.errors import UserError
from jaxalign.planning import topologies
from jaxalign.planning.plans import draft, shapes_of_run
from jaxalign.planning.search import candidates, least_chips, remedies, sweep
from jaxalign.planning.topologies import Chip

CONFIG = TrainConfig(
    architecture=ArchitectureConfig(width=64, layers=2, heads=4, kv_heads=4, mlp_width=128),
    max_length=64,
    preference=PreferenceConfig(steps=1, batch_size=8),
)
STEP = {"none": 40_000, "dots": 20_000, "full": 10_000}
"""Bytes that the compiler of these tests reserves for a pair on each chip."""


@pytest.fixture
def chip(monkeypatch):
    """A chip that gives everything a bound, and a compiler that takes no time."""
    chip = Chip(memory=900_000, flops=1e9, bandwidth=1e9, link=1e8)
    monkeypatch.setitem(topologies.CHIPS, "cpu", chip)
    monkeypatch.setattr(
        "jaxalign.planning.plans.step_memory",
        lambda step, state, frozen, batch, mesh: {
            "temporaries": STEP[step.keywords["objective"].policy.remat]
            * batch.pairs.weight.shape[0]
            // (step.keywords["micro_batches"] * mesh.shape["data"] * mesh.shape["fsdp"])
        },
    )
    return chip


def rate(plan):
    return plan.work["tokens"] / plan.bound


@pytest.mark.parametrize("most", [1, 6])
def test_a_sweep_finds_the_best_that_fit(chip, most):
    found = list(sweep(CONFIG, "cpu:4", "preference", limit=most))
    fitting = [rate(plan) for plan in found if plan.fits]
    shapes = shapes_of_run(CONFIG, "preference")
    everything = [
        draft(one, "cpu:4", "preference", shapes=shapes).plan()
        for one in candidates(CONFIG, "cpu:4", "preference")
    ]
    best = sorted((rate(plan) for plan in everything if plan.fits), reverse=True)
    assert fitting == pytest.approx(best[:most])
    assert len(found) < len(everything) / 3
    assert not all(plan.fits for plan in everything)


def test_candidates_divide_everything():
    made = list(candidates(CONFIG, "cpu:4", "preference"))
    assert {one.preference.batch_size for one in made} == {4, 8, 16, 32}
    assert {one.remat for one in made} == {"none", "dots", "full"}
    meshes = {dataclasses.astuple(one.mesh) for one in made}
    assert meshes == {
        (rows // fsdp, fsdp, 1, 1, 4 // rows)
        for rows in (1, 2, 4)
        for fsdp in (1, 2, 4)
        if fsdp <= rows
    }
    for one in made:
        part = one.preference.batch_size // one.preference.micro_batches
        assert part % (one.mesh.data * one.mesh.fsdp) == 0
    one_head = dataclasses.replace(CONFIG.architecture, heads=1, kv_heads=1)
    stage = PreferenceConfig(steps=1, batch_size=1)
    alone = dataclasses.replace(CONFIG, architecture=one_head, preference=stage)
    with pytest.raises(UserError, match="no mesh of cpu:8 divides 1, half"):
        list(sweep(alone, "cpu:8", "preference"))


def flags(**changes):
    memory = changes.pop("memory", None)
    planned = draft(dataclasses.replace(CONFIG, **changes), "cpu:4", "preference")
    if memory is not None:
        chip = Chip(memory=memory, flops=None, bandwidth=None, link=None)
        planned = dataclasses.replace(planned, chip=chip)
    return [said for said, _ in remedies(planned)]


def test_each_slice_has_parameters_of_its_own(monkeypatch):
    for module in ("plans", "search"):
        monkeypatch.setattr(f"jaxalign.planning.{module}.slices_of", lambda devices: 2)
    meshes = [one.mesh for one in candidates(CONFIG, "cpu:4", "preference")]
    assert {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes} == {
        (4, 1, 1),
        (2, 2, 1),
        (2, 1, 2),
    }
    with pytest.raises(UserError, match=r"mesh\.data: 1 is not a multiple of 2"):
        draft(dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=4)), "cpu:4", "preference")
    with pytest.raises(UserError, match="topology"):
        draft(CONFIG, "2xcpu:4", "preference")


def test_remedies_come_one_after_the_other():
    many = PreferenceConfig(steps=1, batch_size=16)
    found = flags(preference=many, remat="none", mesh=MeshConfig(data=2, fsdp=2), memory=10**9)
    assert found == [
        "--remat full",
        "--remat full --preference.micro-batches 2",
        "--remat full --preference.micro-batches 4",
        "--remat full --preference.micro-batches 4 --mesh.data 1 --mesh.fsdp 4",
        "--remat full --preference.micro-batches 8 --mesh.data 1 --mesh.fsdp 2 --mesh.sequence 2",
        "--remat full --preference.micro-batches 8 --mesh.data 1 --mesh.fsdp 2 --mesh.sequence 2 "
        "--lora.rank 16",
    ]
    heavy = flags(preference=many, remat="full", mesh=MeshConfig(data=2, fsdp=2), memory=10)
    assert heavy[0] == "--mesh.data 1 --mesh.fsdp 4"  # parameters that fill a chip come first
    adapted, few = LoraConfig(rank=2), PreferenceConfig(steps=1, batch_size=4)
    left = flags(preference=few, remat="full", mesh=MeshConfig(fsdp=4), lora=adapted, memory=10**9)
    assert left == ["--mesh.data 1 --mesh.fsdp 2 --mesh.sequence 2 --preference.micro-batches 2"]


def test_every_remedy_makes_a_plan_and_takes_no_more(monkeypatch):
    monkeypatch.setattr("jaxalign.planning.search.RANK", 1)  # the model is small
    many = PreferenceConfig(steps=1, batch_size=16)
    start = dataclasses.replace(CONFIG, preference=many, mesh=MeshConfig(data=2, fsdp=2))
    planned = draft(start, "cpu:4", "preference")

    def kept(one):
        return sum(size for kind, size in one.lasting.items() if kind != "batch")

    before = kept(planned)
    for _, config in remedies(planned):
        after = kept(draft(config, "cpu:4", "preference"))
        assert after <= before
        before = after


def test_least_chips_hold_what_lasts():
    planned = draft(dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=4)), "cpu:4", "preference")
    lasting = sum(planned.lasting.values())
    assert least_chips(planned) is None
    for share, chips in ((1, 4), (2, 2), (0.5, 8)):
        chip = Chip(memory=int(lasting * share), flops=None, bandwidth=None, link=None)
        assert least_chips(dataclasses.replace(planned, chip=chip)) == chips
