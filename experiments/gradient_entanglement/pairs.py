"""Real preference pairs for the studies of losses and cures: one SFT model, many runs from it.

Polite against impolite answers (1,094 pairs, median prompt, chosen and rejected of 48, 50 and 50
characters). `paper` is Pythia 2.8B on HH-RLHF with the settings of the DPO paper's repository.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments.runs import DATA, TINY, finished
from jaxalign.config import (
    EntanglementConfig,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)

PAPER = "EleutherAI/pythia-2.8b"
RATES = {"adamw": 1e-4, "sgd": 3e-3}
"""Peak learning rates (tiny). Gradients are clipped to norm 1, so that losses compare."""


def settings(
    name: str,
    model: str,
    scale: str,
    loss: str,
    options: Mapping[str, float],
    *,
    rule: str = "adamw",
    entanglement: EntanglementConfig,
) -> TrainConfig:
    """A loss from the SFT model."""
    paper = scale == "paper"
    return TrainConfig(
        name=f"pairs_{name}" + ("_paper" if paper else ""),
        model=model,
        data="Anthropic/hh-rlhf"
        if paper
        else str(DATA / "preferences" / "rasbt_instruction_preference.jsonl"),
        bad_records="skip",
        holdout=0.2,
        max_eval_records=256 if paper else 96,
        max_length=512 if paper else 96,
        preference=PreferenceConfig(
            steps=2_500 if paper else 40,
            batch_size=64 if paper else 8,
            optimizer=OptimizerConfig(
                name=rule,
                learning_rate=(5e-7 if rule == "adamw" else 1e-3) if paper else RATES[rule],
                warmup_steps=150 if paper else 5,
            ),
            eval_every=250 if paper else 10,
            loss=loss,
            loss_options=dict(options),
            entanglement=entanglement,
        ),
        dtype="bfloat16" if paper else "float32",
        remat="full" if paper else "none",
        mesh=MeshConfig(fsdp=8) if paper else MeshConfig(),
        export=paper,
    )


def sft_settings(model: str, scale: str) -> TrainConfig:
    """SFT on the chosen responses, from which all runs start."""
    start = settings("sft", model, scale, "dpo", {}, entanglement=EntanglementConfig())
    stage = SupervisedConfig(
        steps=2_500 if scale == "paper" else 60,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=5e-7 if scale == "paper" else 3e-4),
    )
    return replace(start, sft=stage, preference=PreferenceConfig(), export=True)


def supervised(model: str, scale: str) -> str:
    """The folder of the SFT model, which is made where it is missing."""
    config = sft_settings(model, scale)
    folder = Path(config.output) / config.name / "export"
    if not folder.is_dir():
        finished(config)
    return str(folder)


def arguments(description: str | None) -> tuple[str, str]:
    """The SFT model's folder, made where it is missing, and the scale."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--model", help="Hugging Face folder or hub name of the base model")
    flags.add_argument("--scale", choices=("tiny", "paper"), default="tiny")
    given = flags.parse_args()
    base = given.model or (PAPER if given.scale == "paper" else TINY)
    return supervised(base, given.scale), given.scale
