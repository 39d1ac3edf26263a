"""SFT, then DPO, IPO, KTO or SimPO on human preferences.

Command:  jaxalign train experiments/offline/hh.py:dpo [--scale paper], after hh.py:sft; or ipo,
          kto, simpo
Time:     five to ten minutes on two CPU cores
Expect:   the held-out accuracies of the README's table

`tiny` reads the harmless-base test file of HH-RLHF (2,308 dialogues; 15 % of prompts held out)
from the folder of real data; `paper` reads the whole set from the hub, with the settings of the
DPO paper's repository (Pythia 2.8B, one epoch, batch 64, RMSprop, 5e-7 after 150 warm-up steps).
"""

import os
from pathlib import Path
from typing import Any

from jaxalign.config import (
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)

DATA = Path(os.environ.get("JAXALIGN_SHARED", "../shared")) / "data" / "preferences"
TINY, PAPER = "runs/base_lm/export", "EleutherAI/pythia-2.8b"
PAPER_STAGE: dict[str, Any] = {
    "steps": 2_500,
    "batch_size": 64,
    "micro_batches": 2,
    "optimizer": OptimizerConfig(name="rmsprop", learning_rate=5e-7, warmup_steps=150),
    "eval_every": 250,
    "save_every": 250,
}
"""The settings of the DPO paper's repository, for SFT and for preferences."""


def sft(scale: str) -> TrainConfig:
    """SFT on the chosen responses: the model that the other runs start from."""
    if scale == "paper":
        return _paper(name="hh_sft_paper", model=PAPER, sft=SupervisedConfig(**PAPER_STAGE))
    stage = SupervisedConfig(
        steps=120,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=10),
        eval_every=40,
        save_every=40,
    )
    return _tiny(name="hh_sft", model=TINY, sft=stage)


def preference(
    scale: str, loss: str, options: dict[str, float], *, learning_rate: float = 1e-4
) -> TrainConfig:
    """A preference loss from the SFT model, one epoch; the learning rate is that of `tiny`."""
    common: dict[str, Any] = {"loss": loss, "loss_options": options, "reference": "precomputed"}
    if scale == "paper":
        return _paper(
            name=f"hh_{loss}_paper",
            model="runs/hh_sft_paper/export",
            preference=PreferenceConfig(**PAPER_STAGE, **common),
        )
    stage = PreferenceConfig(
        steps=120,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=20),
        eval_every=20,
        save_every=40,
        **common,
    )
    return _tiny(name=f"hh_{loss}", model="runs/hh_sft/export", preference=stage)


def dpo(scale: str) -> TrainConfig:
    """DPO (arXiv:2305.18290)."""
    return preference(scale, "dpo", {"beta": 0.1})


def ipo(scale: str) -> TrainConfig:
    """IPO (arXiv:2310.12036)."""
    return preference(scale, "ipo", {"tau": 0.1})


def kto(scale: str) -> TrainConfig:
    """KTO (arXiv:2402.01306), its paired form."""
    return preference(scale, "kto", {"beta": 0.1})


def simpo(scale: str) -> TrainConfig:
    """SimPO (arXiv:2405.14734)."""
    return preference(scale, "simpo", {"beta": 2.0, "gamma": 1.0})


def _tiny(**fields: Any) -> TrainConfig:
    return TrainConfig(
        data=str(DATA / "hh_harmless_base_test.jsonl"),
        bad_records="skip",
        holdout=0.15,
        max_eval_records=None,
        max_length=256,
        **fields,
    )


def _paper(**fields: Any) -> TrainConfig:
    return TrainConfig(
        data="Anthropic/hh-rlhf",
        eval_data="Anthropic/hh-rlhf#test",
        bad_records="skip",
        max_length=512,
        dtype="bfloat16",
        remat="dots",
        mesh=MeshConfig(fsdp=8),
        **fields,
    )
