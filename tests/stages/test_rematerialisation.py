"""`--remat auto`: decided by memory, said in a line, and kept for whoever resumes."""

import json

import jax
import pytest

from jaxalign.config import (
    AlignmentConfig,
    ArchitectureConfig,
    LoraConfig,
    OnlineConfig,
    PreferenceConfig,
    PretrainingConfig,
    RepresentationConfig,
    RolloutConfig,
    SupervisedConfig,
    TrainConfig,
)
from jaxalign.sharding import make_mesh
from jaxalign.stages import RunContext, kind_of, rematerialisation
from jaxalign.stages.models import embedded_config

STAGE = {"steps": 1, "batch_size": 8}
CONFIG = TrainConfig(
    architecture=ArchitectureConfig(width=32, layers=4, heads=2, kv_heads=2, mlp_width=96),
    max_length=128,
    pretrain=PretrainingConfig(**STAGE),
    sft=SupervisedConfig(**STAGE),
    preference=PreferenceConfig(**STAGE),
    online=OnlineConfig(rollout=RolloutConfig(annotator="rule:nowhere.py:rule"), **STAGE),
    representation=RepresentationConfig(
        alignment=AlignmentConfig(layers=(2,), lora=LoraConfig(rank=2)), **STAGE
    ),
)


@pytest.fixture
def world(tmp_path):
    return RunContext(
        config=CONFIG,
        folder=tmp_path,
        mesh=make_mesh(devices=jax.devices()[:1]),
        model_config=embedded_config(CONFIG.architecture, 300),
        tokenizer=None,
        data=dict.fromkeys(("pretrain", "sft", "preference", "online", "representation")),
        writers=(),
    )


def decided(world, name):
    return rematerialisation.with_remat(kind_of(world.config, name), world)


def free(monkeypatch, size):
    monkeypatch.setattr(rematerialisation, "free_memory", lambda device: size)


@pytest.mark.parametrize("name", ["pretrain", "sft", "preference", "online", "representation"])
def test_every_stage_keeps_products_where_there_is_room_and_nothing_where_there_is_none(
    world, name, monkeypatch, capsys
):
    free(monkeypatch, 18 * 2**30)
    assert decided(world, name).config.remat == "dots"
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: remat dots: activations about ")
    assert said.endswith(" MiB of 18 GiB free\n")
    (world.folder / "remat.json").unlink()
    free(monkeypatch, 0)
    assert decided(world, name).config.remat == "full"


def test_who_resumes_on_another_machine_computes_the_same(world, monkeypatch, capsys):
    free(monkeypatch, 0)
    assert decided(world, "sft").config.remat == "full"
    free(monkeypatch, None)
    assert decided(world, "preference").config.remat == "dots"
    assert "of unknown memory" in capsys.readouterr().out
    assert decided(world, "sft").config.remat == "full"
    assert capsys.readouterr().out == ""
    kept = json.loads((world.folder / "remat.json").read_text())
    assert kept == {"sft": "full", "preference": "dots"}
