"""The reward model among the judges: of UltraFeedback's sample and of short polite answers.

Command:  jaxalign train experiments/judging/reward_model.py  (after `compare` has written its data)
Time:     about a quarter of an hour on two CPU cores
Expect:   runs/judging_reward, which `reward:runs/judging_reward` names
"""

import json
from collections.abc import Iterable
from pathlib import Path

from experiments.runs import DATA, TINY
from jaxalign.config import MeshConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.files import write_json_lines

PAIRS = Path("runs/judging/pairs.jsonl")
SOURCES = ("ultrafeedback_train", "rasbt_instruction_preference")


def write_pairs(judged: Iterable[str], path: Path = PAIRS) -> tuple[int, int]:
    """Write the training pairs without the prompts that judges are measured on.

    Args:
      judged: those prompts.
      path: where to.

    Returns:
      Pairs written, and pairs left out.
    """
    known = {" ".join(prompt.lower().split()) for prompt in judged}
    rows, left_out = [], 0
    for name in SOURCES:
        with (DATA / "preferences" / f"{name}.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if " ".join(row["prompt"].lower().split()) in known:
                    left_out += 1
                else:
                    rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, rows)
    return len(rows), left_out


def config(scale: str = "tiny", model: str = TINY) -> TrainConfig:
    """One epoch on the base model of `experiments/base_lm` (`paper`: a 7B model)."""
    paper = scale == "paper"
    rule = OptimizerConfig(
        learning_rate=1e-5 if paper else 5e-4, schedule="cosine", warmup_steps=10
    )
    return TrainConfig(
        name="judging_reward_paper" if paper else "judging_reward",
        model="mistralai/Mistral-7B-v0.1" if paper else model,
        data=str(PAIRS),
        holdout=0.05,
        prompt_format="Human: {prompt}\n\nAssistant: ",
        max_length=1024 if paper else 320,
        mesh=MeshConfig(fsdp=8) if paper else MeshConfig(),
        dtype="bfloat16" if paper else "float32",
        remat="full" if paper else "none",
        preference=PreferenceConfig(
            steps=124,
            batch_size=16,
            optimizer=rule,
            eval_every=62,
            save_every=62,
            loss="bradley_terry",
        ),
    )
