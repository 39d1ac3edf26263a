"""A chat model of your own, aligned with your own pairs: DPO alone, unless SFT is asked for.

Command:  jaxalign train experiments/finetune.py --model FOLDER --data pairs.jsonl [--lora.rank 16]
          jaxalign train experiments/finetune.py --scale small --lora.rank 16
Time:     of a model of 135 million parameters, 10 to 25 seconds a step of 8 short pairs on two CPU
          cores; `small` has 124 steps
Expect:   a held-out accuracy that leaves 0.5 within the first steps: with `--scale small
          --lora.rank 16 --preference.steps 20` on 64 held-out pairs 0.50 -> 0.86, and a loss of
          0.693 -> 0.685

The rates are those of pretrained models: 1e-6 for all parameters (the default of TRL's DPOConfig),
and for adapters 5e-5, within the 1e-5 to 1e-4 that ten to a hundred times as much is; ten times is
the least that adapters want (Schulman et al., 2025, "LoRA Without Regret"). `--sft.epochs 1` puts
SFT on the chosen responses before it, at 2e-5 and 2e-4 (TRL's SFTConfig, and its page on adapters).
Anything can be set: `--loss`, `--preference.epochs`, `--preference.optimizer.learning-rate` (for a
reward model, `--loss bradley_terry`, set about 1e-5).

`tiny` has the same settings for the embedded model and pairs: at these rates random weights learn
nothing, but the command runs. `small` is SmolLM2-135M-Instruct on pairs of polite and impolite
answers from the folder of real data. `paper` is Zephyr-7B (arXiv:2310.16944): 5e-7 (adapters ten
times as much), batches of 32, three epochs.
"""

import os
from pathlib import Path
from typing import Any

from jaxalign.config import (
    ArchitectureConfig,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)

SCALES = ("tiny", "small", "paper")
DATA = Path(os.environ.get("JAXALIGN_SHARED", "../shared")) / "data" / "preferences"


def config(scale: str, adapters: bool = False) -> TrainConfig:
    """DPO for one epoch, with the learning rate of adapters where these are trained."""
    if scale == "paper":
        rule = OptimizerConfig(learning_rate=5e-6 if adapters else 5e-7, warmup_fraction=0.1)
        return TrainConfig(
            name="finetune_paper",
            model="HuggingFaceH4/mistral-7b-sft-beta",
            data="HuggingFaceH4/ultrafeedback_binarized#train_prefs",
            eval_data="HuggingFaceH4/ultrafeedback_binarized#test_prefs",
            max_length=1024,
            preference=PreferenceConfig(epochs=3.0, batch_size=32, optimizer=rule, save_every=500),
            dtype="bfloat16",
            remat="full",
            mesh=MeshConfig(fsdp=8),
        )
    small = scale == "small"
    return TrainConfig(
        name="finetune",
        model="HuggingFaceTB/SmolLM2-135M-Instruct" if small else "embedded",
        data=str(DATA / "rasbt_instruction_preference.jsonl") if small else "embedded",
        architecture=ArchitectureConfig(context=512),
        max_length=512,
        max_eval_records=128,
        sft=SupervisedConfig(**_stage(2e-4 if adapters else 2e-5)),
        preference=PreferenceConfig(
            epochs=1.0, loss_options={"beta": 0.1}, **_stage(5e-5 if adapters else 1e-6)
        ),
    )


def _stage(learning_rate: float) -> dict[str, Any]:
    """A linear warm-up over a tenth of the steps, then linear to 0."""
    rule = OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.1)
    return {"batch_size": 8, "optimizer": rule, "eval_every": 100, "save_every": 100}
