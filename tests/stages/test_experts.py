"""A mixture of experts through the stages of a run: balance in the metrics, adapters merged in."""

import json

import jax
import numpy as np
import pytest

from jaxalign.config import LoraConfig, PreferenceConfig, SupervisedConfig, TrainConfig
from jaxalign.data import embedded_tokenizer
from jaxalign.errors import UserError
from jaxalign.models import DecoderConfig, init_model, load_pretrained, save_pretrained
from jaxalign.models.config import Experts
from jaxalign.runs.train import train
from tests.tiny_model import save_tiny_model


@pytest.fixture
def folder(tmp_path):
    tokenizer = embedded_tokenizer()
    config = DecoderConfig(
        family="qwen3_moe",
        vocab_size=len(tokenizer),
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=24,
        context_length=64,
        qk_norm="head",
        tied=True,
        experts=Experts(number=4, active=2, width=8, renormalised=True, balance_weight=0.01),
    )
    save_pretrained(init_model(config, jax.random.key(0)), tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def of_run(folder, tmp_path, **fields):
    stage = {"steps": 1, "batch_size": 8}
    wanted = {
        "model": str(folder),
        "output": str(tmp_path),
        "max_length": 32,
        "max_records": 24,
        "max_eval_records": 8,
        "sft": SupervisedConfig(**stage),
        "preference": PreferenceConfig(**stage),
    }
    return TrainConfig(**wanted | fields)


def test_every_stage_reports_the_router_and_a_run_exports_merged_adapters(folder, tmp_path, capfd):
    train(of_run(folder, tmp_path, lora=LoraConfig(rank=2)))
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for stage in ("sft", "preference"):
        found = [x for x in lines if x["stage"] == stage and "router/load" in x]
        assert found, stage
        assert 0.5 <= found[0]["router/load"] <= 1
        assert 0 < found[0]["router/entropy"] <= np.log(4) + 1e-6
        assert found[0]["router/balance_loss"] == pytest.approx(2, abs=1)
    assert not (tmp_path / "run/adapter").exists()
    assert "PEFT's folders hold no adapters of experts" in capfd.readouterr().err
    before, after = load_pretrained(folder), load_pretrained(tmp_path / "run/export")
    assert after.config == before.config
    kernels = (x.params["layers"]["experts"]["up"]["kernel"] for x in (before, after))
    assert not np.array_equal(*kernels)


def test_a_weight_of_the_balance_needs_experts(tmp_path):
    save_tiny_model(tmp_path / "dense")
    with pytest.raises(UserError, match=r"router_balance: .*dense has no experts to balance"):
        train(of_run(tmp_path / "dense", tmp_path, router_balance=0.1))
