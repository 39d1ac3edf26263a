"""A reward model and a pairwise preference model of true answers.

Command:  jaxalign train experiments/reward/true_answers.py:reward_model [--scale paper], or
          true_answers.py:preference_model
Time:     a few minutes on two CPU cores
Expect:   the held-out numbers of the README's table

`tiny` tells true from false answers of TruthfulQA (15 % of the questions held out) with a model of
260 thousand parameters, from the folder of real data; `paper` reads the comparisons of TL;DR
summaries into the T5-XL of arXiv:2312.00886 and arXiv:2403.08635. Learning rate, epsilon, schedule
and batch are those of the reward model of arXiv:2403.17031 (the papers have none).
"""

import os
from pathlib import Path

from jaxalign.config import MeshConfig, OptimizerConfig, PreferenceConfig, TrainConfig

DATA = Path(os.environ.get("JAXALIGN_SHARED", "../shared")) / "data"


def reward_model(scale: str) -> TrainConfig:
    """One scalar per response, with the likelihood of Bradley and Terry."""
    return scores(scale, "bradley_terry")


def preference_model(scale: str) -> TrainConfig:
    """A pairwise preference model (arXiv:2312.00886): it reads both responses, in both orders."""
    return scores(scale, "preference_model")


def scores(scale: str, loss: str) -> TrainConfig:
    """A model with a scalar head, trained by a loss for two epochs (`paper`: one)."""
    if scale == "paper":
        rule = OptimizerConfig(learning_rate=3e-6, eps=1e-5, schedule="cosine")
        return TrainConfig(
            name=f"tldr_{loss}",
            model="google/t5-v1_1-xl",
            data="tfds:tldr_comparisons",
            eval_data="tfds:tldr_comparisons#valid",
            max_length=640 if loss == "bradley_terry" else 768,
            preference=PreferenceConfig(
                steps=1_450,
                batch_size=64,
                micro_batches=2,
                optimizer=rule,
                eval_every=145,
                save_every=145,
                loss=loss,
            ),
            dtype="bfloat16",
            remat="full",
            mesh=MeshConfig(fsdp=8),
        )
    rule = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20)
    return TrainConfig(
        name=f"truthfulqa_{loss}",
        model=str(DATA / "models" / "stories260K"),
        data=str(DATA / "preferences" / "truthfulqa_pairs.jsonl"),
        holdout=0.15,
        max_eval_records=None,
        max_length=192 if loss == "bradley_terry" else 320,
        preference=PreferenceConfig(
            steps=134, batch_size=32, optimizer=rule, eval_every=67, save_every=67, loss=loss
        ),
    )
