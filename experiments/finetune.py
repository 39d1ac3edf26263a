"""A chat model of your own, aligned with your own pairs: no SFT unless asked, then DPO.

Command:  jaxalign train experiments/finetune.py --model FOLDER --data pairs.jsonl [--lora.rank 16]
          jaxalign train experiments/finetune.py --scale small --lora.rank 16
Time:     TIME
Expect:   EXPECT

Rates are those of pretrained models: 1e-6 for all parameters (TRL's DPOConfig), 5e-5 for adapters
(ten times the rate for all parameters or more: Schulman et al., 2025, "LoRA Without Regret"; 5e-5
is SmolLM's neighbourhood, measured below the point where log-probs run away). `--sft.epochs 1`
puts SFT on the chosen responses before it, at 2e-5 and 2e-4. Any field can be set: `--loss`,
`--preference.epochs`, `--preference.optimizer.learning-rate`.

`tiny` has the same settings for the embedded model and pairs (it learns nothing at these rates, and
shows that the command works); `small` is SmolLM2-135M-Instruct on the pairs of polite and impolite
answers in the folder of real data; `paper` is Zephyr-7B (arXiv:2310.16944): 5e-7, batch 32, three
epochs.
"""

import os
from pathlib import Path

from jaxalign.config import (
    ArchitectureConfig,
    MeshConfig,
    OptimizerConfig,
    StageConfig,
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
            preference=StageConfig(epochs=3.0, batch_size=32, optimizer=rule, save_every=500),
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
        sft=_stage(2e-4 if adapters else 2e-5, epochs=0.0),
        preference=_stage(5e-5 if adapters else 1e-6, epochs=1.0),
        loss_options={"beta": 0.1},
    )


def _stage(learning_rate: float, epochs: float) -> StageConfig:
    """A linear warm-up over a tenth of the steps, then linear to 0."""
    rule = OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.1)
    return StageConfig(epochs=epochs, batch_size=8, optimizer=rule, eval_every=100, save_every=100)
