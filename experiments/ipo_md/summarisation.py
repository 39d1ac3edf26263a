"""The paper's comparison: six online methods, a sweep of tau, all against all before a judge.

Command:  python -m experiments.ipo_md.summarisation [--seeds 3] [--steps 100]
Time:     about three quarters of an hour on two CPU cores; what is finished is not done again
Expect:   the sections "sweep" and "all against all" of this folder's README, summarisation.png

The paper summarises news with T5 models of 770M and 3B parameters and a preference model trained on
people's comparisons. Here the policy is the 260K-parameter Llama of TinyStories, which continues
the first sentences of its own stories; preferred is what a classifier of sentiment finds more
positive. Its verdicts on pairs of continuations train a preference model and a reward model of the
policy's size, from which all methods learn; a second classifier, made from other rated reviews,
judges. Choices as in the paper: tau by the win rate on validation prompts, here over the
reference; then three seeds, all nine pairings, on test prompts.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.ipo_md.online import FOLDER, PROMPTS, STORIES, TEST_PROMPTS, online
from experiments.ipo_md.sentiment import Classifier, two_classifiers
from experiments.page import put, table
from experiments.runs import DATA, finished
from jaxalign.config import OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.data import load_tokenizer, prompt_records, tokenize_prompts
from jaxalign.evaluation.bradley_terry import over_seeds, ratings
from jaxalign.evaluation.win_rates import win_rate
from jaxalign.files import write_json_lines
from jaxalign.generation import Sampling
from jaxalign.models import load_pretrained
from jaxalign.online.prompts import prompt_batches
from jaxalign.online.sampler import Sampler
from jaxalign.reporting import read_run
from jaxalign.reporting.online import SHARES
from jaxalign.sharding import make_mesh

HERE = Path(__file__).parent
LABELS = DATA / "imdb"
METHODS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "online_ipo": ("IPO", "tau", (0.1, 0.3, 1.0)),
    "ipo_md": ("IPO-MD", "tau", (0.1, 0.3, 1.0)),
    "online_dpo": ("DPO", "beta", (0.1, 0.3, 1.0)),
    "nash_md_pg": ("Nash-MD-PG", "tau", (0.008, 0.03, 0.1)),
    "online_slic": ("SLiC", "beta", (0.1, 0.3, 1.0)),
    "regularised_policy_gradient": ("RL", "tau", (0.02, 0.05, 0.2)),
}
"""Algorithm -> the paper's name, the strength of its regularisation, and the values tried."""
BETA = 0.125  # of IPO-MD and Nash-MD-PG: the paper's choice


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is run."""

    seeds: int = 3
    """Runs of each method with its chosen strength."""
    steps: int = 100
    """Updates of each."""
    sweep_steps: int = 40
    """Updates of the runs that choose the strength."""
    pairs: int = 4_000
    """Pairs of continuations that preference and reward model learn from."""


def main(options: Options) -> None:
    """Make what is missing, judge, print the tables, write the README's sections and the figure."""
    labeller, judge, accuracy = two_classifiers(LABELS)
    write_prompts()
    facts = annotators(options, labeller, judge) | accuracy
    chosen, rows = sweep(options)
    strengths = table(["method", "strength", *SWEPT], rows)
    print(strengths)
    put(HERE, "sweep", strengths)
    runs = {
        name: [
            finished(run_config(name, chosen[name], options.steps, seed))
            for seed in range(options.seeds)
        ]
        for name in METHODS
    }
    matrix = all_against_all(runs, judge, labeller, facts)
    print(matrix)
    put(HERE, "all against all", matrix)
    draw(runs)


# ------------------------------------------------------------------------------ data


def write_prompts() -> None:
    """First sentences of stories; every fifth is a test prompt."""
    text = (DATA / "text" / "tinystories" / "tinystories_2MB.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    firsts = list(dict.fromkeys(re.split(r"(?<=[.!?])\s", story)[0] for story in stories))
    firsts = [first for first in firsts if 20 <= len(first) <= 120]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, own in (
        (TEST_PROMPTS, firsts[::5]),
        (PROMPTS, [x for i, x in enumerate(firsts) if i % 5]),
    ):
        write_json_lines(path, [{"prompt": x} for x in own])


def continuations(folder: Path | str, prompts: Path, *, samples: int, seed: int) -> list[list[str]]:
    """What a model says after each prompt of a file, at temperature 1."""
    mesh = make_mesh()
    model, tokenizer = load_pretrained(folder, mesh=mesh, dtype=jnp.float32), load_tokenizer(folder)
    rows, _ = tokenize_prompts(prompt_records(str(prompts)), tokenizer, max_length=48)
    sampler = Sampler(
        config=model.config,
        tokenizer=tokenizer,
        sampling=Sampling(max_tokens=32, end_tokens=(int(tokenizer.eos_token_id),)),
        mesh=mesh,
    )
    texts: list[list[str]] = [[] for _ in range(len(rows))]
    batches = prompt_batches(rows, batch_size=64, epochs=1, shuffle=False)
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        policies = {"policy": model.params}
        out = sampler(policies, {"policy": 1.0}, batch, key, samples=samples)
        for at, said, weight in zip(batch.record_index, out.texts, batch.weight, strict=True):
            if weight:
                texts[int(at)] = said
    return texts


def annotators(options: Options, labeller: Classifier, judge: Classifier) -> dict[str, float]:
    """Train preference and reward model on the labeller's verdicts; what they are worth."""
    data = FOLDER / "pairs.jsonl"
    prompts = [record.prompt for record in prompt_records(str(PROMPTS))]
    if not data.exists():
        each = -(-2 * options.pairs // len(prompts))
        each += each % 2
        rows = []
        for prompt, texts in zip(
            prompts, continuations(STORIES, PROMPTS, samples=each, seed=1), strict=True
        ):
            for first, second in zip(texts[::2], texts[1::2], strict=True):
                verdict = labeller.preferences([str(prompt)], [first], [second]).preference[0]
                if verdict != 0.5 and first.strip() and second.strip():
                    sides = (first, second) if verdict > 0.5 else (second, first)
                    row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
                    rows.append(row)
        write_json_lines(data, rows[: options.pairs])
    facts = {}
    for kind, loss in (("preference", "preference_model"), ("reward", "bradley_terry")):
        folder = finished(annotator_config(kind, loss, data))
        ends = read_run(folder).first_and_last("preference", "rewards/accuracies")
        facts[f"{kind} model"] = ends[1] if ends else float("nan")
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    agreed = judge.preferences(
        *([row[x] for row in rows] for x in ("prompt", "chosen", "rejected"))
    )
    return facts | {"judge on labeller": float(agreed.preference.mean())}


def annotator_config(kind: str, loss: str, data: Path) -> TrainConfig:
    """A model with a scalar head that begins as the policy does."""
    return TrainConfig(
        name=f"{kind}_model",
        output=str(FOLDER),
        model=str(STORIES),
        data=str(data),
        max_length=176 if kind == "preference" else 96,
        comparison_format=" A: {first} B: {second} Better:",
        end_token=False,
        holdout=0.1,
        preference=PreferenceConfig(
            steps=200,
            batch_size=32,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20),
            eval_every=100,
            loss=loss,
        ),
    )


# ------------------------------------------------------------------------------ runs


def run_config(name: str, strength: float, steps: int, seed: int, prefix: str = "") -> TrainConfig:
    """A run of a method with a strength of its regularisation."""
    _, parameter, _ = METHODS[name]
    options = {parameter: strength}
    if name in ("ipo_md", "nash_md_pg"):
        options |= {"beta": BETA}
    config = online("tiny", name, options, name=f"{prefix}{name}_{strength:g}_{seed}", seed=seed)
    stage = dataclasses.replace(config.online, steps=steps)
    # the same reference, prompts and held-out prompts for all seeds; draws and order differ
    return dataclasses.replace(config, online=stage, output=str(FOLDER))


SWEPT = ("win rate over the reference", "KL, nats", "tokens")


def sweep(options: Options) -> tuple[dict[str, float], list[list[str]]]:
    """Each method's strength by its win rate on held-out prompts, in its own annotator's eyes."""
    chosen, rows = {}, []
    for name, (label, parameter, values) in METHODS.items():
        ends = {}
        for value in values:
            run = read_run(finished(run_config(name, value, options.sweep_steps, 0, "sweep_")))
            ends[value] = [
                run.curve("online", "eval", x)[1][-1] for x in ("win_rate", "kl", "rollout/length")
            ]
        chosen[name] = max(values, key=lambda value: ends[value][0])
        for value, (wins, kl, length) in ends.items():
            mark = " (chosen)" if value == chosen[name] else ""
            cells = [f"{wins:.3f}", f"{kl:.2f}", f"{length:.1f}"]
            rows.append([f"{label}{mark}", f"{parameter} = {value:g}", *cells])
    return chosen, rows


# ------------------------------------------------------------------------------ judging


def all_against_all(
    runs: dict[str, list[Path]], judge: Classifier, labeller: Classifier, facts: dict[str, float]
) -> str:
    """The paper's table 2 before the judge, the reference and ratings beside it."""
    prompts = [str(record.prompt) for record in prompt_records(str(TEST_PROMPTS))]
    said = {
        METHODS[name][0]: [
            [row[0] for row in continuations(folder / "export", TEST_PROMPTS, samples=1, seed=7)]
            for folder in folders
        ]
        for name, folders in runs.items()
    }
    said["reference"] = [
        [row[0] for row in continuations(STORIES, TEST_PROMPTS, samples=1, seed=7 + seed)]
        for seed in range(1, 1 + len(next(iter(runs.values()))))
    ]
    names = list(said)
    means = np.full((len(names), len(names)), 0.5)
    cells = [["0.500"] * len(names) for _ in names]
    games = np.full((len(prompts), len(names), len(names)), np.nan)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            if i == j:
                continue
            verdicts = [
                judge.preferences(prompts, ours, theirs).preference
                for ours in said[one]
                for theirs in said[other]
            ]
            pairings = over_seeds([win_rate(x, resamples=10).rate for x in verdicts])
            means[i, j] = pairings.mean
            cells[i][j] = f"{pairings.mean:.3f} ({pairings.std:.3f})"
            games[:, i, j] = np.mean(verdicts, axis=0)
    scale = ratings(games)
    order = np.argsort(-scale.elo)
    against = [[names[i], *(cells[i][j] for j in order), _elo(scale, i)] for i in order]
    half = 0.98 / np.sqrt(len(prompts))
    ends = {
        METHODS[name][0]: [
            read_run(folder).curve("online", "eval", "kl")[1][-1] for folder in folders
        ]
        for name, folders in runs.items()
    }
    spent = ", ".join(f"{label} {np.mean(kl):.1f}" for label, kl in ends.items())
    both = "; ".join(f"{name} {_over(prompts, said, name, judge, labeller)}" for name in said)
    spent_on = ", ".join(f"{share.split('/')[1]} {_share(runs, share):.2f}" for share in SHARES)
    pairings, seeds = len(said[names[0]]) ** 2, len(said[names[0]])
    notes = (
        f"Mean preference of the row over the column and, in brackets, its standard deviation over "
        f"{pairings} pairings of {seeds} seeds; {len(prompts)} test prompts each (a single pairing "
        f"is known to ± {half:.3f}). Divergence from the reference at the end, nats a response: "
        f"{spent}.",
        f"Held-out accuracy on the labeller's verdicts: preference model "
        f"{facts['preference model']:.3f}, reward model {facts['reward model']:.3f}. The judge "
        f"agrees with the labeller on {facts['judge on labeller']:.3f} of these pairs. On "
        f"reviews that people rated, not their own, the labeller is right on "
        f"{facts['labeller']:.3f} and the judge on {facts['judge']:.3f}.",
        f"Wins over the reference of each seed before the judge (and before the labeller): {both}. "
        f"Shares of a step's time: {spent_on}.",
    )
    return "\n".join([table(["", *(names[i] for i in order), "Elo"], against), *notes])


def _over(
    prompts: Sequence[str],
    said: dict[str, list[list[str]]],
    name: str,
    judge: Classifier,
    labeller: Classifier,
) -> str:
    """Each seed's win rate over one sample of the reference, before judge and labeller."""
    theirs, cells = said["reference"][0], []
    for ours in said[name]:
        rates = [x.preferences(prompts, ours, theirs).preference.mean() for x in (judge, labeller)]
        cells.append("{:.2f} ({:.2f})".format(*rates))
    return ", ".join(cells)


def _share(runs: dict[str, list[Path]], share: str) -> float:
    """The mean share of a step's time over all runs, first steps left out."""
    folders = [folder for own in runs.values() for folder in own]
    return float(np.mean([read_run(x).curve("online", "train", share)[1][1:] for x in folders]))


def _elo(found, at: int) -> str:
    return f"{found.elo[at]:.0f} ({found.low[at]:.0f} to {found.high[at]:.0f})"


def draw(runs: dict[str, list[Path]]) -> None:
    """Held-out win rate over the steps, and over what it cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, folders in runs.items():
        curves = [
            [read_run(folder).curve("online", "eval", x) for x in ("win_rate", "kl")]
            for folder in folders
        ]
        steps = curves[0][0][0]
        wins, kl = (np.mean([curve[at][1] for curve in curves], axis=0) for at in (0, 1))
        line = left.plot(steps, wins, marker=".", label=METHODS[name][0])[0]
        right.plot(kl, wins, marker=".", color=line.get_color())
    left.set(xlabel="step", ylabel="win rate over the reference", title="Before its own annotator")
    right.set(xlabel="KL to the reference, nats a response", title="What it cost")
    for axis in (left, right):
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(HERE / "summarisation.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
