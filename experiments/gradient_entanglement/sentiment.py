"""The sentiment study: responses that differ in one word, alone or before an identical suffix.

Command:  python -m experiments.gradient_entanglement.sentiment [--model FOLDER] [--scale paper]
Time:     a quarter of an hour on two CPU cores
Expect:   the section "Sentiment" of this folder's README, sentiment.png and heat_map.png

Real sentences about films with their human label: "Review: ... The film is" is followed by " good"
or " bad", and by nothing, a short or a long suffix that is the same in both responses: the first
words of another sentence, so that SFT cannot learn the suffix by heart. SFT on the right label once
per task, then DPO with three seeds. No end-of-sequence token follows: it would be a suffix of one
token. `paper` is GPT-2 with the settings of the official code (SFT 1.41e-5, batch 16, 64 steps; DPO
5e-6, batch 32, beta 0.1).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.page import put, table
from experiments.runs import (
    DATA,
    PAPER,
    TINY,
    change,
    curve,
    finished,
    mean,
    seeds,
    spread,
)
from jaxalign.config import (
    EntanglementConfig,
    OptimizerConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
    read_config,
)
from jaxalign.data import load_tokenizer, pair_batches, preference_records, tokenize_pairs
from jaxalign.entanglement.tokens import token_geometry
from jaxalign.models import load_pretrained
from jaxalign.reporting import heat_map, read_run
from jaxalign.rows import ResponseRows

FOLDER = Path(__file__).parent
SUFFIXES = {"single token": 0, "short suffix": 3, "long suffix": 16}
"""Task -> words of the other sentence."""
SEEDS = (0, 1, 2)


def write_pairs(task: str, folder: Path) -> Path:
    """The task's pairs as files, the right label chosen and the other one rejected.

    The held-out fifth is a file of its own: runs with different seeds share it.
    """
    path = folder / f"{task.replace(' ', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    source = DATA / "sentiment" / "sentiment_sentence_polarity.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))  # negative ones come first
    with path.open("w", encoding="utf-8") as train, held_out(path).open("w") as last:
        for place, (number, other) in enumerate(zip(order, np.roll(order, 1), strict=True)):
            row, suffix = rows[number], rows[other]["text"].split()[: SUFFIXES[task]]
            words = (
                [" good", " bad"] if row["label"] in (1, "pos", "positive") else [" bad", " good"]
            )
            chosen, rejected = (" ".join([word, *suffix]) for word in words)
            prompt = f"Review: {row['text'].strip()}\nThe film is"
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            (last if place % 5 == 4 else train).write(json.dumps(pair) + "\n")
    return path


def held_out(path: Path) -> Path:
    """The held-out pairs of a task."""
    return path.with_stem(f"{path.stem}_held_out")


def sft_settings(task: str, data: Path, model: str, scale: str) -> TrainConfig:
    """SFT on the right labels of a task."""
    paper = scale == "paper"
    start = settings(task, data, model, scale)
    optimizer = OptimizerConfig(
        learning_rate=1.41e-5 if paper else 5e-4, warmup_steps=6, schedule="linear"
    )
    stage = SupervisedConfig(
        steps=64 if paper else 200, batch_size=16 if paper else 64, optimizer=optimizer
    )
    return replace(
        start, name=f"{start.name}_sft", sft=stage, preference=PreferenceConfig(), export=True
    )


def supervised(task: str, data: Path, model: str, scale: str) -> str:
    """The folder of a task's SFT model, which is made where it is missing."""
    config = sft_settings(task, data, model, scale)
    folder = Path(config.output) / config.name / "export"
    if not folder.is_dir():
        finished(config)
    return str(folder)


def settings(task: str, data: Path, model: str, scale: str) -> TrainConfig:
    """DPO with every step watched."""
    paper = scale == "paper"
    return TrainConfig(
        name=f"sentiment_{task.replace(' ', '_')}{'_paper' if paper else ''}",
        model=model,
        data=str(data),
        max_length=96,
        eval_data=str(held_out(data)),
        max_eval_records=128,
        bad_records="skip",
        end_token=False,
        preference=PreferenceConfig(
            steps=260 if paper else 40,
            batch_size=32 if paper else 16,
            optimizer=OptimizerConfig(
                learning_rate=5e-6 if paper else 3e-5, warmup_steps=6, schedule="linear"
            ),
            eval_every=10,
            loss="dpo",
            loss_options={"beta": 0.1},
            reference="precomputed" if paper else "live",
            entanglement=EntanglementConfig(every=1, realised=True),
        ),
    )


def main() -> None:
    """Run what is missing, then write the section and the figures."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", help="Hugging Face folder or hub name")
    flags.add_argument("--scale", choices=("tiny", "paper"), default="tiny")
    given = flags.parse_args()
    model = given.model or (PAPER if given.scale == "paper" else TINY)
    runs = {}
    for task in SUFFIXES:
        data = write_pairs(task, Path("runs/sentiment_pairs"))
        start = supervised(task, data, model, given.scale)
        runs[task] = seeds(settings(task, data, start, given.scale), SEEDS)
    rows = []
    for task, folders in runs.items():
        chosen = [change(folder, "logps/chosen") for folder in folders]
        rejected = [change(folder, "logps/rejected") for folder in folders]
        margin = [a - b for a, b in zip(chosen, rejected, strict=True)]
        accuracy = [read_run(f).first_and_last("preference", "rewards/accuracies") for f in folders]
        rows.append(
            [
                task,
                spread([mean(folder, "cosine") for folder in folders], "{:+.3f}"),
                spread(chosen),
                spread(rejected),
                spread(margin),
                spread([pair[1] for pair in accuracy if pair is not None], "{:.3f}"),
                spread([100 * mean(folder, "both_down") for folder in folders], "{:.0f} %"),
                spread([mean(folder, "realised_chosen") for folder in folders], "{:+.3f}"),
                spread([mean(folder, "realised_rejected") for folder in folders], "{:+.3f}"),
            ]
        )
    header = (
        "task",
        "cosine in training",
        "Δ chosen (nats)",
        "Δ rejected",
        "Δ margin",
        "accuracy",
        "pairs whose own step sends both down",
        "Δ chosen of the batch's own pairs per step",
        "Δ rejected",
    )
    text = table(header, rows) + "\n" + acceptance(runs)
    print(text)
    plot(runs)
    draw_heat_map(runs["long suffix"][0])
    put(FOLDER, "sentiment", f"{text}\n![curves](sentiment.png)\n\n![tokens](heat_map.png)\n")


def acceptance(runs: dict[str, list[Path]]) -> str:
    """What the paper finds, found here or not, seed by seed."""

    def of(task: str, function) -> np.ndarray:
        return np.array([function(folder) for folder in runs[task]])

    single, short, long = SUFFIXES
    cosine = {task: of(task, lambda f: mean(f, "cosine")) for task in SUFFIXES}
    chosen = {task: of(task, lambda f: change(f, "logps/chosen")) for task in SUFFIXES}
    rejected = {task: of(task, lambda f: change(f, "logps/rejected")) for task in SUFFIXES}
    checks = {
        "single token: cosine negative": cosine[single] < 0,
        "short suffix: cosine positive": cosine[short] > 0,
        "long suffix: cosine positive": cosine[long] > 0,
        "cosine larger with the longer suffix": cosine[long] > cosine[short],
        "single token: chosen rises": chosen[single] > 0,
        "single token: chosen of the pairs being trained rises": of(
            single, lambda f: mean(f, "realised_chosen")
        )
        > 0,
        "short suffix: chosen falls": chosen[short] < 0,
        "long suffix: chosen falls": chosen[long] < 0,
        "chosen falls further with the longer suffix": chosen[long] < chosen[short],
        "the margin grows in all tasks": np.all(
            [chosen[task] > rejected[task] for task in SUFFIXES], axis=0
        ),
    }
    rows = [
        [name, f"{int(np.sum(held))} of {len(held)} seeds", "yes" if np.all(held) else "no"]
        for name, held in checks.items()
    ]
    return table(("the paper's finding", "holds in", "reproduced"), rows)


def plot(runs: dict[str, list[Path]]) -> None:
    """Held-out log-probs as changes from the start, and the cosine of the training batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
    for axis, (task, folders) in zip(axes, runs.items(), strict=False):
        for metric, colour in (("chosen", "#4c9f70"), ("rejected", "#c44e52")):
            curves = [
                read_run(folder).curve("preference", "eval", f"logps/{metric}")
                for folder in folders
            ]
            values = np.array([values for _, values in curves])
            values = values - values[:, :1]
            axis.plot(curves[0][0], values.mean(axis=0), color=colour, marker=".", label=metric)
            axis.fill_between(
                curves[0][0], values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2
            )
        axis.set(title=task, xlabel="DPO step")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("held-out log-prob, change in nats")
    for task, folders in runs.items():
        steps, _ = curve(folders[0], "cosine")
        values = np.array([curve(folder, "cosine")[1] for folder in folders])
        axes[3].plot(steps, values.mean(axis=0), label=task)
    axes[3].set(title="Cosine of the gradients", xlabel="DPO step")
    axes[3].axhline(0, color="grey", linewidth=0.8)
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "sentiment.png", dpi=100)
    plt.close(figure)


def draw_heat_map(folder: Path) -> None:
    """Token against token for the first held-out style pair of a run, after its training."""
    kept = read_config(folder / "config.json")
    model = load_pretrained(folder / "export", dtype=jnp.float32)
    tokenizer = load_tokenizer(folder / "export")
    record = next(iter(preference_records(kept.data[0], bad_records="skip")))
    pairs, _ = tokenize_pairs([record], tokenizer, max_length=kept.max_length, end_token=False)
    batch = next(pair_batches(pairs, batch_size=1, epochs=1, shuffle=False))
    pair = ResponseRows(
        tokens=batch.tokens[0],
        prompt_length=batch.prompt_length[0],
        response_tokens=batch.response_tokens[0],
        response_length=batch.response_length[0],
    )
    geometry = jax.jit(lambda params, pair: token_geometry(params, model.config, pair))
    cosines = np.asarray(geometry(model.params, jax.tree.map(jnp.asarray, pair)).cosine)
    length = batch.response_length[0]
    sides = [
        tokenizer.convert_ids_to_tokens(batch.response_tokens[0][side, : length[side]])
        for side in (0, 1)
    ]
    heat_map.draw(
        cosines[: length[0], : length[1]],
        *sides,
        FOLDER / "heat_map.png",
        title="long suffix, after DPO",
    )


if __name__ == "__main__":
    main()
