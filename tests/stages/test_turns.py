"""Runs on conversations: all turns of the assistant are scored, padded and packed alike."""

import json

import pytest

from jaxalign.config import (
    ArchitectureConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)
from jaxalign.errors import UserError
from jaxalign.files import read_json
from jaxalign.reporting import read_run
from jaxalign.runs.train import train


def talk(number, *answers):
    turns = []
    for at, answer in enumerate(answers):
        turns += [
            {"role": "user", "content": f"count {number + at}"},
            {"role": "assistant", "content": answer},
        ]
    return turns


@pytest.mark.parametrize("stage", ["sft", pytest.param("preference", marks=pytest.mark.slow)])
def test_padded_and_packed_runs_of_several_turns_have_the_same_losses(tmp_path, stage):
    rows = [
        {
            "prompt": talk(n, "one", "two")[:-1],
            "chosen": talk(n, "one", "two", f"good {n}")[3:],
            "rejected": talk(n, "one", "no " * (n % 3 + 1), "bad", "worse")[3:],
        }
        for n in range(24)
    ]
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    still = OptimizerConfig(learning_rate=0.0)
    steps = {"steps": 1, "batch_size": 8, "eval_every": 1, "save_every": 0, "optimizer": still}
    losses = []
    for packing in ("never", "always"):
        stages = {
            "sft": SupervisedConfig(turns="all", packing=packing, **steps),
            "preference": PreferenceConfig(
                loss="simpo", packing=packing, share_prompts="never", **steps
            ),
        }
        config = TrainConfig(
            name=packing,
            output=str(tmp_path / "runs"),
            architecture=ArchitectureConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
            max_length=128,
            holdout=0.3,
            data=(str(data),),
            export=False,
            **{stage: stages[stage]},
        )
        folder = train(config)
        lines = [line for line in read_run(folder).lines if line["split"] == "eval"]
        losses.append([line["loss"] for line in lines])
        rows, sides = ("train_responses", 1) if stage == "sft" else ("train_pairs", 2)
        counts = read_json(folder / "data.json", "counts")[rows]
        assert counts["user_turns"] == sides * counts["records"]
    assert losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_hindsight_is_of_single_responses():
    with pytest.raises(UserError, match=r"sft\.turns: an instruction of hindsight"):
        TrainConfig(sft=SupervisedConfig(turns="all", responses="hindsight"))
