"""DPO on collected pairs: `--data FOLDER/pairs.jsonl --name NAME` say which."""

import os
from pathlib import Path

from jaxalign.config import MeshConfig, OptimizerConfig, PreferenceConfig, TrainConfig

DATA = Path(os.environ.get("JAXALIGN_SHARED", "../shared")) / "data"


def config(scale: str = "tiny") -> TrainConfig:
    """`tiny`: the model that wrote the pairs; `paper`: a 7B model on an endpoint's pairs."""
    if scale == "paper":
        rule = OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup_steps=150)
        return TrainConfig(
            name="collected_dpo",
            model="mistralai/Mistral-7B-Instruct-v0.2",
            data="runs/collected/pairs.jsonl",
            max_length=1024,
            preference=PreferenceConfig(
                steps=1_000, batch_size=64, micro_batches=2, optimizer=rule
            ),
            dtype="bfloat16",
            remat="full",
            mesh=MeshConfig(fsdp=8),
        )
    rule = OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_steps=5)
    return TrainConfig(
        name="collected_dpo",
        model=str(DATA / "models" / "stories260K"),
        data="runs/best_of_8/pairs.jsonl",
        holdout=0.1,
        max_length=96,
        end_token=False,  # responses are cut at 40 tokens, and do not end there
        preference=PreferenceConfig(
            steps=60, batch_size=16, optimizer=rule, eval_every=30, save_every=60
        ),
    )
