"""What the runs of the online methods share: models, prompts, annotators, schedules.

`tiny` continues the first sentences of TinyStories with the 260K-parameter Llama of the folder of
real weights; its annotators are trained by `summarisation.py`. `paper` is the paper's set-up where
it is known (appendix B): a T5 v1.1 large policy after SFT on TL;DR, XSum prompts, preference and
reward models of T5 v1.1 XL's size, Adafactor without momentum at a constant rate, 32 prompts a
step; lengths and the temperature are not in the paper, and are ours.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.runs import DATA
from jaxalign.config import MeshConfig, OnlineConfig, OptimizerConfig, RolloutConfig, TrainConfig

FOLDER = Path("runs/ipo_md")
"""Where everything of this study lies."""
STORIES = DATA / "models" / "stories260K"
PROMPTS, TEST_PROMPTS = FOLDER / "prompts.jsonl", FOLDER / "test_prompts.jsonl"
POLICY_GRADIENTS = ("regularised_policy_gradient", "nash_md_pg", "self_play_pg", "nash_ema_pg")
REWARDED = ("regularised_policy_gradient", "rloo", "ppo")
PAPER_OPTIONS: dict[str, dict[str, float]] = {
    "regularised_policy_gradient": {"tau": 0.05},
    "online_ipo": {"tau": 1.0},
    "online_dpo": {"beta": 5.0},
    "online_slic": {"beta": 10.0},
    "ipo_md": {"tau": 1.0, "beta": 0.125},
    "nash_md_pg": {"tau": 0.008, "beta": 0.125},
}
"""The paper's choices (appendix B.3)."""


def online(
    scale: str, algorithm: str, options: dict[str, float] | None = None, **changes: Any
) -> TrainConfig:
    """A run of an online method from the reference.

    Args:
      scale: "tiny" or "paper".
      algorithm: a row of the table of online algorithms.
      options: its hyperparameters; by default the paper's.
      **changes: other fields of the config.
    """
    options = PAPER_OPTIONS.get(algorithm, {}) if options is None else options
    config = _paper(algorithm, options) if scale == "paper" else _tiny(algorithm, options)
    return replace(config, **changes)


def annotator(algorithm: str, suffix: str = "") -> str:
    """The reward model for methods on rewards, the preference model for the others."""
    kind = "reward" if algorithm in REWARDED else "preference"
    return f"{kind}:{FOLDER}/{kind}_model{suffix}"


def _tiny(algorithm: str, options: dict[str, float]) -> TrainConfig:
    rate = 1e-4 if algorithm in POLICY_GRADIENTS else 3e-4  # the paper's have such a ratio, too
    return TrainConfig(
        name=algorithm,
        model=str(STORIES),
        holdout=0.1,
        online=OnlineConfig(
            steps=100,
            batch_size=16,
            # no first moment: it orbits on cycles of preferences
            optimizer=OptimizerConfig(learning_rate=rate, b1=0.0, schedule="linear"),
            eval_every=50,
            rollout=RolloutConfig(
                algorithm=algorithm,
                options=options,
                prompts=str(PROMPTS),
                annotator=annotator(algorithm),
                max_prompt_length=48,
                max_tokens=32,
                max_eval_prompts=128,
                record=2,
            ),
        ),
    )


def _paper(algorithm: str, options: dict[str, float]) -> TrainConfig:
    rate = 3e-5 if algorithm == "nash_md_pg" else 1e-4
    return TrainConfig(
        name=f"xsum_{algorithm}",
        model=str(FOLDER / "tldr_sft" / "export"),
        prompt_format="summarize: {prompt}",
        online=OnlineConfig(
            steps=20_000,
            batch_size=32,
            optimizer=OptimizerConfig(
                name="adafactor",
                learning_rate=rate,
                schedule="constant",
                parameter_scale=True,
                clip_norm=None,
            ),
            eval_every=2_000,
            save_every=2_000,
            rollout=RolloutConfig(
                algorithm=algorithm,
                options=options,
                prompts=str(FOLDER / "xsum_train.jsonl"),
                eval_prompts=str(FOLDER / "xsum_validation.jsonl"),
                annotator=annotator(algorithm, "_xl"),
                max_prompt_length=512,
                max_tokens=64,
                max_eval_prompts=2_000,
            ),
        ),
        dtype="bfloat16",
        remat="full",
        mesh=MeshConfig(fsdp=8),
    )
