"""Every method on the same pairs and base, scored by a held-out judge.

Command:  python -m experiments.rahf.compare --scale small --model FOLDER --steps 36 --batch 4
              --prompts 48 --tokens 48 --seeds 0
          python -m experiments.rahf.compare [--seeds 0 1 2] [--steps 120] [--prompts 164]
Time:     a seed of `small` takes 21 to 40 minutes of one CPU core at these sizes; three seeds of
          `tiny` take an hour and a half on two CPU cores
Needs:    at `small` a chat model, at `tiny` the base model of experiments/base_lm
Expect:   a file under rows/ for every method of every seed as it ends, and this folder's README

The same command resumes: neither runs nor rows that are there are made again. The judge of `small`
reads words (`word_reward.py`); that of `tiny` is a reward model.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from experiments.page import half_width, put, table
from experiments.rahf import methods, word_reward
from experiments.rows import Rows, same_options
from experiments.runs import finished
from jaxalign.config import OnlineConfig, RepresentationConfig, SupervisedConfig, TrainConfig
from jaxalign.data import (
    load_tokenizer,
    pair_batches,
    preference_records,
    prompt_records,
    tokenize_pairs,
    tokenize_prompts,
)
from jaxalign.data.plain_prompts import plain_prompts
from jaxalign.errors import UserError
from jaxalign.evaluation import length_controlled
from jaxalign.evaluation.reward_models import RewardModel
from jaxalign.generation import Sampling
from jaxalign.models import load_pretrained
from jaxalign.models.responses import response_log_probs
from jaxalign.online.prompts import prompt_batches
from jaxalign.online.sampler import Sampler
from jaxalign.representation.stimuli import instructed
from jaxalign.rows import ResponseRows
from jaxalign.sharding import make_mesh, row_parts
from jaxalign.stages.inputs import instructions_of

FOLDER = Path(__file__).parent
BATCH, TOKENS = 32, 64
"""Prompts in a batch, and most tokens of an answer."""
COMPARED = {
    "base": "base",
    "preferred_sft": "preferred SFT",
    "hir": "HIR",
    "dpo": "DPO",
    "policy_gradient": "regularised policy gradient",
    "scit": "RAHF-SCIT",
    "dual": "RAHF-Dual",
}
NEEDS = {
    "policy_gradient": ("reward", "policy_gradient"),
    "dual": ("preferred_sft", "rejected_sft", "dual"),
}
"""Runs behind a method, in their order, where there is more than its own."""
CASES = ("parted", "both down", "both up", "crossed")
"""Of the log-probs of chosen and rejected: chosen up and rejected down, ..., chosen down alone."""
Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Prompts and responses -> rewards."""


def configs(seed: int, given: argparse.Namespace) -> dict[str, TrainConfig]:
    """Every run of a seed."""
    how = {"output": f"{given.output}/seed_{seed}", "model": given.model}
    scale = given.scale
    made = {
        name: getattr(methods, name)(scale, **how)
        for name in ("preferred_sft", "rejected_sft", *list(COMPARED)[2:])
    }
    if scale == "tiny":
        made |= {name: getattr(methods, name)(scale, **how) for name in ("judge", "reward")}
        made["base"] = methods.instruction_sft(scale, **how)
    return {name: shortened(one, given.steps, seed, given.batch) for name, one in made.items()}


def shortened(
    config: TrainConfig, steps: int | None, seed: int, batch: int | None = None
) -> TrainConfig:
    """The config with another seed, and with that many steps in each of its stages.

    With a batch, of so many pairs or prompts, or of the responses of so many pairs, and without
    evaluations in the runs themselves.
    """
    stages: dict[str, Any] = {}
    for name in ("sft", "preference", "online", "representation"):
        stage = getattr(config, name)
        if not stage.runs:
            continue
        if steps is not None:
            rule = dataclasses.replace(stage.optimizer, warmup_steps=steps // 10)
            if stage.optimizer.warmup_steps == 0:
                rule = stage.optimizer
            stage = dataclasses.replace(stage, steps=steps, optimizer=rule)
        if batch is not None:
            responses = isinstance(stage, SupervisedConfig | RepresentationConfig)
            stage = dataclasses.replace(stage, batch_size=2 * batch if responses else batch)
            if isinstance(stage, OnlineConfig):
                rollout = dataclasses.replace(stage.rollout, max_eval_prompts=0)
                stage = dataclasses.replace(stage, rollout=rollout)
        stages[name] = stage
    if batch is not None:
        stages["max_eval_records"] = 0
    return dataclasses.replace(config, seed=seed, **stages)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a policy answered to the test prompts."""

    responses: Sequence[str]
    length: np.ndarray
    """Tokens of each."""
    log_ratio: np.ndarray
    """To the base, in nats, of the policy's own samples: their mean is the divergence."""
    base_log_prob: np.ndarray
    """Of the same samples under the base, in nats."""


def make_sampler(model: Any, tokenizer: Any, max_tokens: int) -> Sampler:
    """A sampler at temperature 1 until the tokenizer's end token."""
    sampling = Sampling(max_tokens=max_tokens, end_tokens=(int(tokenizer.eos_token_id),))
    return Sampler(config=model, tokenizer=tokenizer, sampling=sampling, mesh=make_mesh())


def answers(
    policy: Mapping[str, Any],
    base: Mapping[str, Any],
    prompts: Any,
    sampler: Sampler,
    batch_size: int = BATCH,
) -> Said:
    """A response to each prompt, with the same random numbers for every policy."""
    columns: tuple[list[Any], ...] = ([], [], [], [])
    parts = row_parts(sampler.mesh)  # every device gets as many rows
    size = -(-min(batch_size, len(prompts)) // parts) * parts
    for at, batch in enumerate(prompt_batches(prompts, batch_size=size, epochs=1, shuffle=False)):
        found = sampler(
            {"policy": policy, "base": base},
            {"policy": 1.0, "base": 0.0},
            batch,
            jax.random.fold_in(jax.random.key(7), at),
            samples=1,
        )
        real = np.asarray(batch.weight) > 0
        order = np.asarray(batch.record_index)[real].tolist()
        own, of_base = (found.log_prob[x].sum(-1)[real, 0] for x in ("policy", "base"))
        texts = [row[0] for row, counts in zip(found.texts, real, strict=True) if counts]
        values = texts, found.length[real, 0].tolist(), (own - of_base).tolist(), of_base.tolist()
        for column, new in zip(columns, values, strict=True):
            column += list(zip(order, new, strict=True))
    texts, length, ratio, of_base = ([x for _, x in sorted(column)] for column in columns)
    return Said(
        responses=texts,
        length=np.array(length),
        log_ratio=np.array(ratio),
        base_log_prob=np.array(of_base),
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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the methods of a seed share."""

    given: argparse.Namespace
    made: Mapping[str, TrainConfig]
    start: Path | str
    """Folder of the base."""
    tokenizer: Any
    base: Any
    judge: Judge
    sampler: Sampler


def by_words(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """The judge of a chat model's answers, which reads the responses alone."""
    del prompts
    return word_reward.of(methods.JUDGED)(responses)


def make_setting(seed: int, given: argparse.Namespace) -> Setting:
    """The base and the judge, trained where they are not there."""
    made = configs(seed, given)
    start = finished(made["base"]) / "export" if "base" in made else given.model
    tokenizer, base = load_tokenizer(start), load_pretrained(start, mesh=make_mesh())
    if "judge" in made:
        judge: Judge = RewardModel.load(finished(made["judge"]) / "export").rewards
    else:
        judge = by_words
    sampler = make_sampler(base.config, tokenizer, given.tokens)
    return Setting(
        given=given,
        made=made,
        start=start,
        tokenizer=tokenizer,
        base=base,
        judge=judge,
        sampler=sampler,
    )


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Train a method where it is not there, and measure it."""
    given, made = setting.given, setting.made
    folder = setting.start
    if name != "base":
        runs = [finished(made[x]) for x in NEEDS.get(name, (name,)) if x in made]
        folder = runs[-1] / "export"
    config = made.get(name, made["hir"])
    records = list(preference_records(methods.TEST))[: given.prompts]
    questions = list(prompt_records(methods.TEST))[: given.prompts]
    asked = [str(record.prompt) for record in records]
    told = instructions_of(config).positive if name == "hir" else None  # it was taught that
    layout = config.prompt_format
    in_chat = plain_prompts(setting.tokenizer, config.chat, prompt_format=layout).as_turns
    if told is not None and in_chat:
        records, questions = (with_instruction(x, told) for x in (records, questions))
    elif told is not None:
        layout = f"{told}\n\n{layout}"
    options: dict[str, Any] = {"prompt_format": layout, "max_length": config.max_length}
    options["chat"] = "always" if in_chat else "never"
    prompts, _ = tokenize_prompts(questions, setting.tokenizer, **options)
    pairs, _ = tokenize_pairs(records, setting.tokenizer, **options)
    model = setting.base if name == "base" else load_pretrained(folder, mesh=make_mesh())
    said = answers(model.params, setting.base.params, prompts, setting.sampler)
    return {
        "reward": setting.judge(asked, said.responses).tolist(),
        "characters": [len(text) for text in said.responses],
        "tokens": said.length.tolist(),
        "KL": said.log_ratio.tolist(),
        "fluency": (said.base_log_prob / said.length).tolist(),
        "log_probs": pair_log_probs(model.params, pairs, setting.base.config).tolist(),
        "answers": list(said.responses),
    }


def run_seed(seed: int, given: argparse.Namespace, rows: Rows) -> None:
    """Everything of a seed that is not there yet."""
    names = [name for name in given.methods if name not in rows]
    if not names:
        return
    setting = make_setting(seed, given)
    for name in names:
        began = time.process_time()
        row = measure(name, setting)
        rows.write(name, {**row, "cpu_seconds": time.process_time() - began})


def by_prompt(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The measures of a method, prompt by prompt."""
    rewards = np.array(row["reward"])
    change = np.array(row["log_probs"]) - np.array(base["log_probs"])
    is_base = row is base
    return {
        "reward": rewards,
        "win rate": expit(rewards - np.array(base["reward"])),
        "accuracy": np.full(len(rewards), 0.5) if is_base else 1.0 * (change[:, 0] > change[:, 1]),
        "KL": np.array(row["KL"]),
        "fluency": np.array(row["fluency"]),
        "tokens": np.array(row["tokens"], np.float64),
    }


def measures(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """The measures of a method of a seed that are not means over prompts."""
    same = 0.5
    if row is not base:
        lengths = (np.array(x["characters"], np.float64) for x in (row, base))
        same = length_controlled(by_prompt(row, base)["win rate"], *lengths).rate
    shares = cases(np.array(base["log_probs"]), np.array(row["log_probs"]))
    return {"win rate at equal length": same} | dict(zip(CASES, shares, strict=True))


def cell(values: Sequence[float], digits: int) -> str:
    """Mean over seeds; of several, with the half-width of its 95 % interval (Student's t)."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {half_width(values):.{digits}f}"


Seeds = Sequence[Mapping[str, Mapping[str, Any]]]
"""The rows of every seed, by method."""


def having(seeds: Seeds, *names: str) -> Seeds:
    """The seeds that have rows of these methods."""
    return [one for one in seeds if all(name in one for name in names)]


def compared(seeds: Seeds) -> list[str]:
    """The methods that any seed has, in the order of the tables."""
    return [name for name in COMPARED if having(seeds, "base", name)]


def side_by_side(seeds: Seeds) -> str:
    """The judge's mean preference of each row over each column, over the seeds that have both."""
    names = compared(seeds)

    def at(row: str, column: str) -> str:
        both = having(seeds, row, column)
        if row == column or not both:
            return ""
        gaps = [np.array(one[row]["reward"]) - np.array(one[column]["reward"]) for one in both]
        return across([expit(gap) for gap in gaps], 3)

    lines = [[COMPARED[row], *(at(row, column) for column in names)] for row in names]
    return table(["the row over the column", *(COMPARED[x] for x in names)], lines)


def across(values: Sequence[np.ndarray], digits: int) -> str:
    """Mean of a measure, with its interval over seeds.

    Over prompts, where seeds do not differ: a single one, or the base where it is not trained.
    """
    if all(np.allclose(values[0], one, atol=1e-3) for one in values):
        return f"{np.mean(values[0]):.{digits}f} ± {half_width(values[0].tolist()):.{digits}f}"
    return cell([float(np.mean(one)) for one in values], digits)


SHOWN = {
    "reward": ("reward", 3),
    "win rate": ("beats the base", 3),
    "win rate at equal length": ("at equal length", 3),
    "accuracy": ("accuracy", 3),
    "KL": ("KL (nats a response)", 2),
    "fluency": ("fluency (nats/token)", 2),
    "tokens": ("tokens", 1),
}
"""Measure -> its column and digits."""


def tables(seeds: Seeds) -> str:
    """The three tables, each method of the seeds that have it."""
    names = compared(seeds)

    def value(name: str, key: str, digits: int) -> str:
        own = having(seeds, "base", name)
        each = [by_prompt(one[name], one["base"]).get(key) for one in own]
        if any(one is None for one in each):
            return cell([measures(one[name], one["base"])[key] for one in own], digits)
        return across([one for one in each if one is not None], digits)

    numbers = {name: len(having(seeds, "base", name)) for name in names}
    differ = len(set(numbers.values())) > 1
    lines = [
        [
            COMPARED[name],
            *([str(numbers[name])] if differ else []),
            *(value(name, key, digits) for key, (_, digits) in SHOWN.items()),
        ]
        for name in names
    ]
    header = ["method", *(["seeds"] if differ else []), *(label for label, _ in SHOWN.values())]
    text = table(header, lines)
    moved = [
        [COMPARED[name], *(value(name, key, 3) for key in CASES)]
        for name in names
        if name != "base"
    ]
    return "\n".join([text, table(["method", *CASES], moved), side_by_side(seeds)])


def plot(seeds: Seeds, path: Path) -> None:
    """The judge's preference against the divergence, and the change of the pairs' log-probs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for number, name in enumerate(compared(seeds)):
        own = having(seeds, "base", name)
        for one in own:
            values = by_prompt(one[name], one["base"])
            first = one is own[0]
            look = {"color": f"C{number}", "label": COMPARED[name] if first else None}
            width = {
                key: 0.0 if name == "base" else half_width(values[key].tolist())
                for key in ("KL", "win rate")
            }
            left.errorbar(
                values["KL"].mean(),
                values["win rate"].mean(),
                xerr=width["KL"],
                yerr=width["win rate"],
                marker="o",
                capsize=2,
                **look,
            )
            change = np.array(one[name]["log_probs"]) - np.array(one["base"]["log_probs"])
            if name != "base":
                right.scatter(change[:, 1], change[:, 0], s=10, **look)
    left.axhline(0.5, color="grey", linewidth=0.8)
    left.set(xlabel="KL to the base (nats a response)", ylabel="beats the base")
    right.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    right.axhline(0, color="grey", linewidth=0.8)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set(xlabel="change of rejected (nats)", ylabel="change of chosen (nats)")
    left.legend(fontsize=7, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def command_of(given: argparse.Namespace) -> str:
    """The flags that made the rows."""
    parts = ["--scale small --model FOLDER"] if given.scale == "small" else []
    parts.append(f"--seeds {' '.join(map(str, given.seeds))} --prompts {given.prompts}")
    parts += [f"--{x} {getattr(given, x)}" for x in ("steps", "batch") if getattr(given, x)]
    parts += [f"--tokens {given.tokens}"] if given.tokens != TOKENS else []
    return f"python -m experiments.rahf.compare {' '.join(parts)}"


def main() -> None:
    """Train, measure, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, help="of every stage; default: those of the configs")
    flags.add_argument(
        "--batch", type=int, help="pairs or prompts of an update; default: those of the configs"
    )
    flags.add_argument("--prompts", type=int, default=164, help="test prompts")
    flags.add_argument("--tokens", type=int, default=TOKENS, help="most of an answer")
    flags.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(COMPARED))
    flags.add_argument("--output", default="runs/rahf")
    flags.add_argument("--scale", default="tiny", choices=("tiny", "small"))
    flags.add_argument("--model", default=methods.SMALL, help="the chat model of `small`")
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of results")
    given = flags.parse_args()
    folder = given.rows / f"{given.scale}_comparison"
    options = {x: getattr(given, x) for x in ("steps", "batch", "prompts", "tokens")}
    options["model"] = Path(given.model).name if given.scale == "small" else "base_lm"
    same_options(folder.with_name(f"{folder.name}_options.json"), options)
    of_seeds = [Rows(folder=folder / f"seed_{seed}") for seed in given.seeds]
    for seed, rows in zip(given.seeds, of_seeds, strict=True):
        run_seed(seed, given, rows)
    seeds = [{name: rows[name] for name in rows.names()} for rows in of_seeds]
    text = tables(seeds)
    print(text)
    section = "comparison" if given.scale == "tiny" else f"{given.scale} comparison"
    shown = f"`{command_of(given)}` printed:\n\n{text}"
    if given.scale == "small":
        plot(seeds, FOLDER / "comparison.png")
        shown += "\n![preference against divergence, and pairs](comparison.png)\n"
    put(FOLDER, section, shown)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"compare: {error}") from None
