"""A run of several sources: how often each is used, and what each one's held-out records say."""

import json

import pytest

from jaxalign.config import (
    ArchitectureConfig,
    FeedbackConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
    from_json,
    to_json,
)
from jaxalign.files import read_json
from jaxalign.reporting import read_run
from jaxalign.runs.train import train

STEPS = {"steps": 3, "batch_size": 8, "eval_every": 3, "save_every": 0}
RULE = OptimizerConfig(learning_rate=1e-2)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    short = [{"prompt": f"Say {n}", "chosen": f"{n} it is", "rejected": "no"} for n in range(40)]
    long = [
        {"prompt": f"Count {n}", "chosen": "one two three " * 4, "rejected": f"{n} " * 9}
        for n in range(20)
    ]
    return write(tmp_path / "short.jsonl", short), write(tmp_path / "long.jsonl", long)


def run(tmp_path, data, **fields):
    config = TrainConfig(
        output=str(tmp_path / "runs"),
        architecture=ArchitectureConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        max_length=64,
        holdout=0.25,
        data=data,
        export=False,
        **fields,
    )
    return train(config)


@pytest.mark.parametrize("packing", ["never", "always"])
def test_every_source_is_counted_and_evaluated_by_itself(tmp_path, sources, capsys, packing):
    short, long = sources
    stages = {
        "sft": SupervisedConfig(optimizer=RULE, packing=packing, **STEPS),
        "preference": PreferenceConfig(optimizer=RULE, packing=packing, **STEPS),
        "feedback": FeedbackConfig(optimizer=RULE, packing=packing, **STEPS),
    }
    folder = run(tmp_path, (f"{short}:0.5", long), name=packing, **stages)
    counts = read_json(folder / "data.json", "counts")
    kept = {name: counts[f"mixture of pairs {name}"] for name in ("short", "long")}
    assert kept["long"]["used_an_epoch"] == kept["long"]["examples"]
    assert kept["short"]["used_an_epoch"] == round(kept["short"]["examples"] / 2)
    assert "pairs of an epoch: short " in capsys.readouterr().out
    lines = [line for line in read_run(folder).lines if line["split"] == "eval"]
    assert {line["stage"] for line in lines} == set(stages)
    for line in lines:
        parts = {name: line[f"by_source/{name}/loss"] for name in ("short", "long")}
        assert min(parts.values()) - 1e-6 <= line["loss"] <= max(parts.values()) + 1e-6
    held_out = {name: counts[f"data {name}"]["read"] - kept[name]["examples"] for name in kept}
    assert sum(held_out.values()) == counts["held_out_pairs"]["records"]
    report = (folder / "report" / "report.md").read_text()
    assert "| stage | source | loss |" in report
    for stage in stages:
        for source in kept:
            assert f"| {stage} | {source} | " in report
    for line in lines:
        if line["stage"] == "preference":  # a mean over pairs
            of_all = sum(
                held_out[name] * line[f"by_source/{name}/rewards/margins"] for name in kept
            )
            total = sum(held_out.values())
            assert line["rewards/margins"] == pytest.approx(of_all / total, abs=1e-5)
            assert line["by_source/long/kl"] >= 0


def test_a_source_says_the_same_in_a_mixture_as_alone(tmp_path, sources):
    preference = PreferenceConfig(optimizer=RULE, **STEPS)
    both = run(tmp_path, sources, name="both", preference=preference, eval_data=sources)
    before = {}
    for name, source in zip(("short", "long"), sources, strict=True):
        alone = run(tmp_path, source, name=name, preference=preference, eval_data=source)
        before[name] = next(one for one in read_run(alone).lines if one["split"] == "eval")
    line = next(one for one in read_run(both).lines if one["split"] == "eval")
    for name, own in before.items():
        for metric in ("loss", "logps/chosen", "logps/rejected"):
            assert line[f"by_source/{name}/{metric}"] == pytest.approx(own[metric], abs=1e-4)


def test_one_source_may_be_a_text_and_old_configs_have_texts():
    config = TrainConfig(data="a.jsonl", sft=SupervisedConfig(data="b.jsonl"))
    assert (config.data, config.eval_data, config.sft.data) == (("a.jsonl",), (), ("b.jsonl",))
    assert from_json(to_json(config)) == config
    fields = json.loads(to_json(config))
    fields |= {"data": "a.jsonl", "eval_data": None}
    fields["sft"]["data"] = "b.jsonl"
    assert from_json(json.dumps(fields)) == config
