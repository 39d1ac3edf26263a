"""The main job: a small model from scratch, SFT for a moment, then a preference loss.

Command:  jaxalign train experiments/quickstart.py [--loss ipo]
          (its rates are for random weights; experiments/finetune.py is for a model of yours)
Time:     about two minutes on two CPU cores
Expect:   held-out reward accuracy above 0.9 on the embedded preference set
"""

from jaxalign.config import (
    ArchitectureConfig,
    EntanglementConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    """The embedded model and preference set; any field can be set on the command line."""
    return TrainConfig(
        name="quickstart",
        architecture=ArchitectureConfig(
            width=128, layers=4, heads=4, kv_heads=2, mlp_width=384, context=128
        ),
        max_length=128,
        max_eval_records=256,
        sft=SupervisedConfig(
            steps=120,
            batch_size=128,  # of about 32 tokens each
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=10),
        ),
        preference=PreferenceConfig(
            steps=80,
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup_steps=8),
            eval_every=20,
            save_every=40,
            loss="dpo",
            loss_options={"beta": 0.1},
            entanglement=EntanglementConfig(every=1),
        ),
    )
