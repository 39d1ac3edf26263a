"""The README's table: every method on the same pairs and base, scored by a held-out reward model.

Command:  python -m experiments.rahf.compare --scale small --model FOLDER [--seeds 0 1 2]
          python -m experiments.rahf.compare [--seeds 0 1 2] [--steps 120] [--prompts 164]
Time:     a seed of `small` takes minutes on a GPU; three seeds of `tiny` take an hour and a half on
          two CPU cores; what is there is not run again
Needs:    at `tiny` the base model of experiments/base_lm
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from experiments.gradient_entanglement.runs import finished
from experiments.page import half_width, put, table
from experiments.rahf import methods
from jaxalign.config import TrainConfig
from jaxalign.data import (
    load_tokenizer,
    pair_batches,
    preference_records,
    prompt_records,
    tokenize_pairs,
    tokenize_prompts,
)
from jaxalign.data.plain_prompts import plain_prompts
from jaxalign.evaluation import length_controlled, win_rate
from jaxalign.evaluation.reward_models import RewardModel
from jaxalign.files import read_json, write_json
from jaxalign.generation import Sampling
from jaxalign.models import load_pretrained
from jaxalign.models.responses import response_log_probs
from jaxalign.online.prompts import prompt_batches
from jaxalign.online.sampler import Sampler
from jaxalign.representation.stimuli import instructed
from jaxalign.rows import ResponseRows
from jaxalign.sharding import make_mesh
from jaxalign.stages.inputs import instructions_of

FOLDER = Path(__file__).parent
BATCH = 32
MAX_TOKENS = 64
COMPARED = {
    "base": "base",
    "preferred_sft": "preferred SFT",
    "hir": "HIR",
    "dpo": "DPO",
    "policy_gradient": "regularised policy gradient",
    "scit": "RAHF-SCIT",
    "dual": "RAHF-Dual",
}
ORDER = ("base", "judge", "reward", "preferred_sft", "rejected_sft", *list(COMPARED)[2:])
CASES = ("parted", "both down", "both up", "crossed")
"""Of the log-probs of chosen and rejected: chosen up and rejected down, ..., chosen down alone."""


def configs(seed: int, given: argparse.Namespace) -> dict[str, TrainConfig]:
    """Every run of a seed, in an order in which each finds what it needs."""
    how = {"output": f"{given.output}/seed_{seed}", "model": given.model}
    scale, steps = given.scale, given.steps
    made = {
        "judge": methods.judge(scale, **how),
        "reward": methods.reward(scale, **how),
        "preferred_sft": methods.preferred_sft(scale, **how),
        "rejected_sft": methods.rejected_sft(scale, **how),
        "hir": methods.hir(scale, **how),
        "dpo": methods.dpo(scale, **how),
        "policy_gradient": methods.policy_gradient(scale, **how),
        "scit": methods.scit(scale, **how),
        "dual": methods.dual(scale, **how),
    }
    if scale == "tiny":
        made["base"] = methods.instruction_sft(scale, **how)
    return {name: shortened(made[name], steps, seed) for name in ORDER if name in made}


def shortened(config: TrainConfig, steps: int | None, seed: int) -> TrainConfig:
    """The config with another seed, and with that many steps in each of its stages."""
    stages = {}
    for name in ("sft", "preference", "online", "representation"):
        stage = getattr(config, name)
        if stage.steps and steps is not None:
            rule = dataclasses.replace(stage.optimizer, warmup_steps=steps // 10)
            if stage.optimizer.warmup_steps == 0:
                rule = stage.optimizer
            stages[name] = dataclasses.replace(stage, steps=steps, optimizer=rule)
    return dataclasses.replace(config, seed=seed, **stages)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a policy answered to the test prompts."""

    responses: Sequence[str]
    length: np.ndarray
    """Tokens of each."""
    log_ratio: np.ndarray
    """To the base, in nats, of the policy's own samples: their mean is the divergence."""


def answers(
    policy: Mapping[str, Any], base: Mapping[str, Any], prompts: Any, model: Any, tokenizer: Any
) -> Said:
    """A response to each prompt, sampled at temperature 1 until the tokenizer's end token."""
    sampling = Sampling(max_tokens=MAX_TOKENS, end_tokens=(int(tokenizer.eos_token_id),))
    sampler = Sampler(config=model, tokenizer=tokenizer, sampling=sampling, mesh=make_mesh())
    texts, lengths, ratios = [], [], []
    for at, batch in enumerate(prompt_batches(prompts, batch_size=BATCH, epochs=1, shuffle=False)):
        found = sampler(
            {"policy": policy, "base": base},
            {"policy": 1.0, "base": 0.0},
            batch,
            jax.random.fold_in(jax.random.key(7), at),
            samples=1,
        )
        real = batch.weight > 0
        order = np.asarray(batch.record_index)[real]
        ratio = (found.log_prob["policy"] - found.log_prob["base"]).sum(-1)[real, 0]
        kept = [row[0] for row, counts in zip(found.texts, real, strict=True) if counts]
        texts += list(zip(order.tolist(), kept, strict=True))
        lengths += list(zip(order.tolist(), found.length[real, 0].tolist(), strict=True))
        ratios += list(zip(order.tolist(), ratio.tolist(), strict=True))
    in_order = [[value for _, value in sorted(column)] for column in (texts, lengths, ratios)]
    return Said(
        responses=in_order[0], length=np.array(in_order[1]), log_ratio=np.array(in_order[2])
    )


def pair_log_probs(params: Mapping[str, Any], pairs: Any, model: Any) -> np.ndarray:
    """Log-probs of the test pairs, [pairs, 2], in nats."""

    @jax.jit
    def run(params: Mapping[str, Any], rows: ResponseRows) -> jax.Array:
        return response_log_probs(params, model, rows).log_prob.sum(-1).reshape(-1, 2)

    found = []
    for batch in pair_batches(pairs, batch_size=BATCH, epochs=1, shuffle=False, window=1):
        rows = jax.tree.map(jnp.asarray, batch.rows())
        found.append(np.asarray(run(params, rows))[np.asarray(batch.weight) > 0])
    return np.concatenate(found)


def cases(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Shares of pairs by what became of chosen and rejected."""
    up = after > before
    chosen, rejected = up[:, 0], up[:, 1]
    each = chosen & ~rejected, ~chosen & ~rejected, chosen & rejected, ~chosen & rejected
    return [float(one.mean()) for one in each]


def with_instruction(records: Sequence[Any], instruction: str) -> list[Any]:
    """The same records with the instruction as the system turn of their prompts."""
    return [
        dataclasses.replace(one, prompt=instructed(one.prompt, instruction, strings_as_chat=True))
        for one in records
    ]


def measure(
    seed: int, given: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], list[list[float]]]:
    """Train what is not there; every method's measures, and all against all before the judge."""
    made = configs(seed, given)
    runs = {name: finished(one) for name, one in made.items()}
    records = list(preference_records(methods.TEST))[: given.prompts]
    questions = list(prompt_records(methods.TEST))[: given.prompts]
    judge = RewardModel.load(runs["judge"] / "export")
    start = runs["base"] / "export" if "base" in runs else given.model
    tokenizer = load_tokenizer(start)
    asked = [str(record.prompt) for record in records]
    mesh = make_mesh()
    base = load_pretrained(start, mesh=mesh)
    found: dict[str, dict[str, float]] = {}
    kept: dict[str, tuple[Any, Any]] = {}
    rewards: dict[str, np.ndarray] = {}
    for name in COMPARED:
        config = made.get(name, made["hir"])
        told = instructions_of(config).positive if name == "hir" else None  # it was taught that
        layout, rows, asking = config.prompt_format, records, questions
        in_chat = plain_prompts(tokenizer, config.chat, prompt_format=layout).as_turns
        if told is not None and in_chat:
            rows, asking = (with_instruction(x, told) for x in (records, questions))
        elif told is not None:
            layout = f"{told}\n\n{layout}"
        options: dict[str, Any] = {"prompt_format": layout, "max_length": config.max_length}
        options["chat"] = "always" if in_chat else "never"
        prompts, _ = tokenize_prompts(asking, tokenizer, **options)
        pairs, _ = tokenize_pairs(rows, tokenizer, **options)
        model = load_pretrained(start if name == "base" else runs[name] / "export", mesh=mesh)
        said = answers(model.params, base.params, prompts, base.config, tokenizer)
        log_probs = pair_log_probs(model.params, pairs, base.config)
        kept[name] = said, log_probs
        rewards[name] = judge.rewards(asked, said.responses)
        first, before = kept["base"]
        better = judge.preferences(asked, said.responses, first.responses).preference
        rates = [0.5, 0.5]
        if name != "base":
            same = length_controlled(better, *(map_lengths(x) for x in (said, first)))
            rates = [win_rate(better).rate, same.rate]
        change = log_probs - before
        found[name] = {
            "reward": float(rewards[name].mean()),
            "win rate": rates[0],
            "win rate at equal length": rates[1],
            "accuracy": float(np.mean(change[:, 0] > change[:, 1])) if name != "base" else 0.5,
            "KL": float(said.log_ratio.mean()),
            "tokens": float(said.length.mean()),
        } | dict(zip(CASES, cases(before, log_probs), strict=True))
    scores = np.array(list(rewards.values()))  # Bradley and Terry's preference, prompt by prompt
    return found, expit(scores[:, None] - scores[None]).mean(-1).tolist()


def measured(
    seed: int, given: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """What `measure` found, from its file where that is of the same options."""
    path = given.rows / f"{given.scale}_{seed}.json"
    world = {"model": Path(given.model).name, "steps": given.steps, "prompts": given.prompts}
    kept = read_json(path, "rows") if path.is_file() else {}
    if kept.get("options") != world:
        found, against = measure(seed, given)
        kept = {"options": world, "methods": found, "against": against}
        write_json(path, kept)
    return kept["methods"], np.array(kept["against"])


def map_lengths(said: Said) -> np.ndarray:
    """Characters of each response."""
    return np.array([float(len(text)) for text in said.responses])


def cell(values: Sequence[float], digits: int) -> str:
    """Mean over seeds; of several, with the half-width of its 95 % interval (Student's t)."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {half_width(values):.{digits}f}"


def side_by_side(matrices: Sequence[np.ndarray]) -> str:
    """The judge's mean preference of each row over each column, over seeds."""
    labels = list(COMPARED.values())

    def at(i: int, j: int) -> str:
        return "" if i == j else cell([matrix[i, j] for matrix in matrices], 3)

    rows = [[name, *(at(i, j) for j in range(len(labels)))] for i, name in enumerate(labels)]
    return table(["the row over the column", *labels], rows)


def main() -> None:
    """Train, measure, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, help="of every stage; default: those of the configs")
    flags.add_argument("--prompts", type=int, default=164, help="test prompts")
    flags.add_argument("--output", default="runs/rahf")
    flags.add_argument("--scale", default="tiny", choices=("tiny", "small"))
    flags.add_argument("--model", default=methods.SMALL, help="the chat model of `small`")
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of results")
    given = flags.parse_args()
    given.rows.mkdir(parents=True, exist_ok=True)
    both = [measured(seed, given) for seed in given.seeds]
    each, against = [found for found, _ in both], [matrix for _, matrix in both]
    columns = {
        "reward": 3,
        "win rate": 3,
        "win rate at equal length": 3,
        "accuracy": 3,
        "KL": 2,
        "tokens": 1,
    }

    def rows(shown: Mapping[str, int]) -> list[list[str]]:
        return [
            [label, *(cell([one[name][key] for one in each], at) for key, at in shown.items())]
            for name, label in COMPARED.items()
        ]

    header = ["method", "reward", "beats the base", "at equal length", "accuracy",
              "KL (nats a response)", "tokens"]  # fmt: skip
    text = table(header, rows(columns))
    text += "\n" + table(["method", *CASES], rows(dict.fromkeys(CASES, 3))[1:])  # not the base
    text += "\n" + side_by_side(against)
    print(text)
    command = "--scale small --model FOLDER " if given.scale == "small" else ""
    command += f"--seeds {' '.join(map(str, given.seeds))} --prompts {given.prompts}"
    command += f" --steps {given.steps}" if given.steps else ""
    section = "comparison" if given.scale == "tiny" else f"{given.scale} comparison"
    put(FOLDER, section, f"`python -m experiments.rahf.compare {command}` printed:\n\n{text}")


if __name__ == "__main__":
    main()
