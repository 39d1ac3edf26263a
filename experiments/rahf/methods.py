"""The methods compared in this folder: RAHF beside SFT, HIR, DPO and a policy gradient.

Command:  jaxalign train experiments/rahf/methods.py:scit [--scale small], or another function
          below; dual needs preferred_sft and rejected_sft, policy_gradient needs reward, and at
          `tiny` and `paper` all others need instruction_sft
Time:     a few minutes each on two CPU cores (`tiny`)

`small` makes the short answers of SmolLM2-135M-Instruct polite (1,094 pairs: the first 60 % to
train on, then 25 % for the held-out judge, the last 15 % to be tested on); it begins with the chat
model itself, trains adapters, and its policy gradient is rewarded by `word_reward.polite`. `tiny`
is the same with the base model of `experiments/base_lm` after SFT; `paper` is Llama-2-7B on
UltraFeedback with the settings of arXiv:2312.15997's released scripts, halves of the data as there.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.runs import DATA, TINY
from jaxalign.config import (
    AlignmentConfig,
    LoraConfig,
    MeshConfig,
    OnlineConfig,
    OptimizerConfig,
    PreferenceConfig,
    RepresentationConfig,
    RolloutConfig,
    SupervisedConfig,
    TrainConfig,
)

PAIRS = f"{DATA}/preferences/rasbt_instruction_preference.jsonl"
TRAIN, JUDGED, TEST = (f"{PAIRS}#train[{part}]" for part in (":60%", "60%:85%", "85%:"))
ULTRA = "argilla/ultrafeedback-binarized-preferences-cleaned"
PAPER = f"{ULTRA}#train[:49%]", f"{ULTRA}#train[49%:98%]", f"{ULTRA}#train[98%:]"
SCALES = ("tiny", "small", "paper")
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RATES = {
    "sft": {"tiny": 3e-4, "small": 5e-4, "paper": 2e-5},
    "dpo": {"tiny": 1e-4, "small": 2e-4, "paper": 5e-7},
    "reward": {"tiny": 3e-4, "small": 2e-4, "paper": 1e-5},
    "policy gradient": {"tiny": 1e-4, "small": 2e-4, "paper": 1e-6},
    "scit": {"tiny": 3e-4, "small": 5e-4, "paper": 2e-5},
    "scit fit": {"tiny": 3e-3, "small": 1e-3, "paper": 3e-4},
    "dual fit": {"tiny": 3e-3, "small": 1e-3, "paper": 9e-6},
}
"""Stage -> scale -> learning rate; at `paper` the released scripts', and DPO's authors' for DPO."""
FORMAT = "Human: {prompt}\n\nAssistant: "
WORD_REWARD = Path(__file__).with_name("word_reward.py")
STEPS = 120
"""Updates of each stage in `tiny` and `small`: of 16 pairs, three epochs."""


def run_name(scale: str, name: str) -> str:
    """The folder of a run."""
    return f"rahf_{name}" if scale == "tiny" else f"rahf_{name}_{scale}"


def common(scale: str, name: str, output: str = "runs", model: str = SMALL) -> TrainConfig:
    """A run without stages yet; the model is that of `small`."""
    if scale == "paper":
        return TrainConfig(
            name=run_name(scale, name),
            output=output,
            model=f"{output}/rahf_base_paper/export",
            data=PAPER[0],
            eval_data=PAPER[2],
            bad_records="skip",
            prompt_format=FORMAT,
            max_length=1024,
            dtype="bfloat16",
            remat="full",
            mesh=MeshConfig(fsdp=64),
        )
    if scale == "small":
        return TrainConfig(
            name=run_name(scale, name),
            output=output,
            model=model,
            data=TRAIN,
            eval_data=TEST,
            max_length=320,
            max_eval_records=None,
            lora=LoraConfig(rank=16),
            representation=RepresentationConfig(alignment=AlignmentConfig(instructions="short")),
        )
    return TrainConfig(
        name=run_name(scale, name),
        output=output,
        model=f"{output}/rahf_base/export",
        data=TRAIN,
        eval_data=TEST,
        prompt_format=FORMAT,
        max_length=320,
        max_eval_records=None,
        representation=RepresentationConfig(alignment=AlignmentConfig(instructions="short")),
    )


def stage(scale: str, what: str, *, steps: int = 1_000, batch: int = 64) -> dict[str, Any]:
    """Fields of one stage: AdamW after a warm-up of a tenth, linear to 0 (`paper`: cosine)."""
    rate = RATES[what][scale]
    if scale == "paper":
        rule = OptimizerConfig(learning_rate=rate, schedule="cosine", warmup_steps=steps // 10)
        return {"steps": steps, "batch_size": batch, "optimizer": rule, "save_every": 400}
    rule = OptimizerConfig(learning_rate=rate, warmup_steps=STEPS // 10)
    return {"steps": STEPS, "batch_size": 16, "optimizer": rule}


def fit(scale: str, what: str, **paper: Any) -> dict[str, Any]:
    """Fields of the fit of adapters: a constant learning rate."""
    found = stage(scale, what, **paper)
    rule = dataclasses.replace(found["optimizer"], schedule="constant", warmup_steps=0)
    return {**found, "optimizer": rule}


def instruction_sft(scale: str, **how: Any) -> TrainConfig:
    """The model that all others begin with: SFT on instructions that are not of these pairs.

    At `small` they begin with the chat model itself, which has learned from instructions.
    """
    config = common(scale, "base", **how)
    if scale == "paper":
        model, data = "meta-llama/Llama-2-7b-hf", "Dahoas/full-hh-rlhf"
    else:
        model = config.model if scale == "small" else TINY
        data = f"{DATA}/sft/sft_alpaca_en_demo.jsonl"
    size = {} if scale == "paper" else {"batch_size": 64}
    sft = SupervisedConfig(data=data, **stage(scale, "sft", steps=4_700) | size)
    return dataclasses.replace(config, model=model, sft=sft)


def supervised(scale: str, responses: Any, name: str, **how: Any) -> TrainConfig:
    """SFT on chosen or rejected responses, or on both with hindsight."""
    rate = stage(scale, "sft")
    sft = SupervisedConfig(responses=responses, **rate)
    return dataclasses.replace(common(scale, name, **how), sft=sft)


def preferred_sft(scale: str, **how: Any) -> TrainConfig:
    """Preferred-SFT, and the preferred model of RAHF-Dual."""
    return supervised(scale, "chosen", "preferred_sft", **how)


def rejected_sft(scale: str, **how: Any) -> TrainConfig:
    """The dispreferred model of RAHF-Dual: SFT on rejected responses."""
    return supervised(scale, "rejected", "rejected_sft", **how)


def hir(scale: str, **how: Any) -> TrainConfig:
    """Hindsight instruction relabelling (arXiv:2302.05206), its supervised part."""
    return supervised(scale, "hindsight", "hir", **how)


def dpo(scale: str, **how: Any) -> TrainConfig:
    """DPO, beta 0.1; the paper does not give its settings: those of the DPO repository."""
    rate = stage(scale, "dpo")
    return dataclasses.replace(common(scale, "dpo", **how), preference=PreferenceConfig(**rate))


def reward(scale: str, **how: Any) -> TrainConfig:
    """The reward model that the policy gradient maximises."""
    return reward_model(scale, "reward", **how)


def judge(scale: str, **how: Any) -> TrainConfig:
    """The held-out reward model: of pairs that no other run reads."""
    return reward_model(scale, "judge", **how)


def reward_model(scale: str, which: str, **how: Any) -> TrainConfig:
    """A reward model of the training pairs ("reward") or of held-out pairs ("judge")."""
    config = common(scale, which, **how)
    data = (PAPER if scale == "paper" else (TRAIN, JUDGED))[which == "judge"]
    rate = stage(scale, "reward")
    preference = PreferenceConfig(loss="bradley_terry", **rate)
    return dataclasses.replace(config, data=data, preference=preference)


def policy_gradient(scale: str, **how: Any) -> TrainConfig:
    """The regularised policy gradient (in place of PPO), rewarded by "reward"."""
    config = common(scale, "policy_gradient", **how)
    annotator = f"reward:{config.output}/{run_name(scale, 'reward')}/export"
    rollout = RolloutConfig(
        algorithm="regularised_policy_gradient",
        prompts=PAPER[1] if scale == "paper" else TRAIN,
        eval_prompts=config.eval_data[0] if config.eval_data else None,
        annotator=None if scale == "small" else annotator,
        reward=(f"{WORD_REWARD}:polite",) if scale == "small" else (),
        max_prompt_length=256 if scale == "paper" else 128,
        max_tokens=512 if scale == "paper" else 32,
    )
    rate = stage(scale, "policy gradient")
    return dataclasses.replace(config, online=OnlineConfig(rollout=rollout, **rate))


def scit(scale: str, **how: Any) -> TrainConfig:
    """RAHF-SCIT: contrastive instruction tuning, then the fit, from one command."""
    config = common(scale, "scit", **how)
    tuned = stage(scale, "scit", steps=930)
    fitted = fit(scale, "scit fit", steps=450)
    method = dataclasses.replace(config.representation.alignment, method="scit")
    return dataclasses.replace(
        config,
        preference=PreferenceConfig(loss="scit_mean", **tuned),
        representation=RepresentationConfig(alignment=method, **fitted),
    )


def dual(scale: str, **how: Any) -> TrainConfig:
    """RAHF-Dual from the models of `supervised`: as released, the preferred one is the base."""
    config = common(scale, "dual", **how)
    method = dataclasses.replace(
        config.representation.alignment,
        method="dual",
        negative_model=f"{config.output}/{run_name(scale, 'rejected_sft')}/export",
        lora=LoraConfig(rank=8, dropout=0.05, targets=("q", "v")),
    )
    rate = fit(scale, "dual fit", steps=2_500, batch=64)
    return dataclasses.replace(
        config,
        model=f"{config.output}/{run_name(scale, 'preferred_sft')}/export",
        representation=RepresentationConfig(alignment=method, **rate),
    )
