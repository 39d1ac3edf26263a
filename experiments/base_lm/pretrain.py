"""A base model of our own: a Llama pretrained on the text that `prepare` writes.

Command:  jaxalign train experiments/base_lm/pretrain.py
          jaxalign train experiments/base_lm/pretrain.py --scale paper   (a GPU or TPU host)
Time:     about an hour on two CPU cores
Expect:   runs/base_lm/export, a Hugging Face folder
"""

from pathlib import Path

from jaxalign.config import ArchitectureConfig, OptimizerConfig, PretrainingConfig, TrainConfig

TEXT = Path("runs/base_lm_text")


def config(scale: str) -> TrainConfig:
    """6M parameters and 8M tokens (tiny); 58M parameters and 1.2G tokens (paper)."""
    tiny = scale == "tiny"
    if tiny:
        architecture = ArchitectureConfig(
            width=256, layers=6, heads=8, kv_heads=4, mlp_width=704, context=512, vocabulary=4096
        )
    else:
        architecture = ArchitectureConfig(
            width=512,
            layers=16,
            heads=8,
            kv_heads=4,
            mlp_width=1408,
            context=1024,
            vocabulary=16384,
        )
    steps = 2_000 if tiny else 9_200
    return TrainConfig(
        name="base_lm" if tiny else "base_lm_paper",
        architecture=architecture,
        max_length=256 if tiny else 1024,
        dtype="float32" if tiny else "bfloat16",
        pretrain=PretrainingConfig(
            steps=steps,
            batch_size=16 if tiny else 128,
            optimizer=OptimizerConfig(
                learning_rate=3e-3 if tiny else 1e-3,
                schedule="cosine",
                warmup_steps=100 if tiny else 500,
                final_fraction=0.05,
                weight_decay=0.1,
                b2=0.95,
            ),
            eval_every=250,
            save_every=100,
            text=(str(TEXT / "train.jsonl"),),
            eval_text=tuple(
                str(TEXT / f"held_out_{name}.jsonl") for name in ("books", "reviews", "stories")
            ),
        ),
    )
