"""SFT, then DPO, IPO, SimPO, KTO and a weighted sum of a real chat model on two sources of pairs.

Command:  python -m experiments.small --model FOLDER --cells offline [--workers 8 --minutes 10]
          python -m experiments.offline.small --rows runs/small/rows/offline
Time:     of a model of 135 million parameters, minutes on an H100, two days on two CPU cores
Expect:   the section "A real chat model" of this folder's README, and small.png

All parameters are trained on UltraFeedback and, half as often, polite and impolite answers. One SFT
model is the start and the reference of all runs. Each loss is run with three learning rates on one
seed; the rate with the highest accuracy on a split of its own is run with two more seeds (of the
order of the pairs). The table is of a third split.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.cells import Cell
from experiments.page import half_width, put, table
from experiments.rows import Rows
from experiments.short_runs import Bench, Finished, Start
from jaxalign.config import FeedbackConfig, OptimizerConfig, SupervisedConfig, TrainConfig
from jaxalign.errors import UserError
from jaxalign.evaluation import win_rate
from jaxalign.files import read_arrays, write_arrays

FOLDER = Path(__file__).parent
STUDY = "offline"
SOURCES = {"ultrafeedback": "UltraFeedback", "polite": "polite pairs"}
LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "dpo": ("dpo", {"beta": 0.1}),
    "ipo": ("ipo", {"tau": 0.1}),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 1.0}),
    "kto": ("kto", {"beta": 0.1}),
    "dpo_sft": ("dpo:1 sft:0.2", {"dpo.beta": 0.1}),
}
"""Cell -> loss and hyperparameters."""
LABELS = {
    "sft": "SFT",
    "dpo": "DPO, beta 0.1",
    "ipo": "IPO, tau 0.1",
    "simpo": "SimPO, beta 2, gamma 1",
    "kto": "KTO, beta 0.1",
    "dpo_sft": "DPO + 0.2 SFT",
    "kto_single": "KTO of single responses",
}
BASE = "SmolLM2-135M-Instruct"
SHOWN = (5, 8)
"""Numbers of the questions whose answers are shown."""
STEPS, PAIRS, LENGTH = 64, 16, 512
SFT_STEPS, SFT_RATE = 60, 2e-5
ANSWER = 160
"""Most tokens of an answer."""


def settings(bench: Bench, name: str, seed: int = 0) -> TrainConfig:
    """The data of all runs: a mixture to train on, held-out splits of each source."""
    options = bench.options
    splits = ("test", "sweep") if len(options.rates) > 1 else ("test",)
    return TrainConfig(
        name=f"offline_{name}",
        model=options.model,
        data=(options.data("ultrafeedback", "train"), options.data("polite", "train") + ":0.5"),
        eval_data=tuple(options.data(source, split) for split in splits for source in SOURCES),
        max_length=options.max_length or LENGTH,
        max_eval_records=options.held_out,
        bad_records="skip",
        dtype=bench.dtype,
        remat="full" if bench.is_gpu else "none",
        export=False,
        seed=seed,
    )


def rule(rate: float) -> OptimizerConfig:
    """AdamW; a linear warm-up over a tenth of the steps, then linear to 0."""
    return OptimizerConfig(learning_rate=rate, warmup_fraction=0.1)


def preferences(bench: Bench, name: str, rate: float, seed: int) -> TrainConfig:
    """A run of a loss of pairs."""
    loss, options = LOSSES[name]
    stage = bench.preference(
        loss=loss,
        loss_options=options,
        steps=bench.options.steps or STEPS,
        batch_size=bench.options.pairs or PAIRS,
        optimizer=rule(rate),
    )
    return replace(settings(bench, name, seed), preference=stage)


def labelled(bench: Bench, rate: float, seed: int) -> TrainConfig:
    """KTO of as many single responses as the others have in pairs."""
    stage = FeedbackConfig(
        loss_options={"beta": 0.1},
        steps=bench.options.steps or STEPS,
        batch_size=2 * (bench.options.pairs or PAIRS),
        optimizer=rule(rate),
        **bench.unpacked,
    )
    return replace(settings(bench, "kto_single", seed), feedback=stage)


def sft(bench: Bench) -> None:
    """The model that all losses start from."""
    rows, start = bench.rows(STUDY), bench.model(bench.options.model)
    stage = SupervisedConfig(
        steps=bench.options.steps or SFT_STEPS,
        batch_size=2 * (bench.options.pairs or PAIRS),
        optimizer=rule(SFT_RATE),
        **bench.unpacked,
    )
    config = replace(settings(bench, "sft"), sft=stage)
    finished = bench.run(start, config, "sft")
    leaves = jax.tree.leaves(finished.params)
    path = _sft_weights(bench)
    write_arrays(path, **{f"x{at}": np.asarray(leaf) for at, leaf in enumerate(leaves)})
    rows.write("sft", finished.row(config, "sft"))


def first_answers(bench: Bench) -> None:
    """The answers of the published model and of the SFT model."""
    rows, start = bench.rows(STUDY), bench.model(bench.options.model)
    rows.write("answers_base", {"answers": bench.answers(start, start.params, ANSWER)})
    tuned = sft_model(bench)
    rows.write("answers_sft", {"answers": bench.answers(tuned, tuned.params, ANSWER)})


def sft_model(bench: Bench) -> Start:
    """The SFT model."""
    start = bench.model(bench.options.model)
    leaves, shape = jax.tree.flatten(start.params)
    names = [f"x{at}" for at in range(len(leaves))]
    path = _sft_weights(bench)
    arrays = read_arrays(path, names)
    if arrays is None:
        raise UserError(f"{path}: cannot be read; remove the row offline/sft and run it again")
    placed = [
        jax.device_put(arrays[name], leaf.sharding)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return replace(start, name="sft", params=shape.unflatten(placed))


def _sft_weights(bench: Bench) -> Path:
    return bench.options.output / "sft.npz"


def compare(bench: Bench, name: str) -> None:
    """A loss: its learning rates on one seed, the best one on the others, and its answers."""
    rows, start = bench.rows(STUDY), sft_model(bench)
    newest: dict[str, Any] = {}  # the parameters of the run before, by its row's name

    def run(rate: float, seed: int) -> None:
        label = row_name(name, rate, seed)
        config = preferences(bench, name, rate, seed)
        newest.clear()
        finished = bench.run(start, config, "preference")
        newest[label] = finished.params
        rows.write(label, finished.row(config, "preference", cell=name))

    first, *others = bench.options.seeds
    for rate in bench.options.rates:
        if row_name(name, rate, first) not in rows:
            run(rate, first)
    best = best_rate(rows, name)
    for seed in others:
        if row_name(name, best, seed) not in rows:
            run(best, seed)
    last = bench.options.seeds[-1]
    label = row_name(name, best, last)
    if label not in newest:  # another rate was run after it, or an interrupted command ran it
        run(best, last)
    rows.write(f"answers_{name}", {"answers": bench.answers(start, newest[label], ANSWER)})


def single_responses(bench: Bench) -> None:
    """KTO of single responses, at the learning rate of KTO of pairs; evaluated on pairs."""
    rows, start = bench.rows(STUDY), sft_model(bench)
    rate = best_rate(rows, "kto")
    of_pairs: Finished | None = None
    for seed in bench.options.seeds:
        label = row_name("kto_single", rate, seed)
        if label in rows:
            continue
        config = labelled(bench, rate, seed)
        finished = bench.run(start, config, "feedback", held_out=False)
        if of_pairs is None:  # for its evaluation
            one = replace(preferences(bench, "kto", 0.0, 0), name="offline_kto_single_pairs")
            short = replace(one.preference, steps=1, optimizer=OptimizerConfig(learning_rate=0.0))
            of_pairs = bench.run(start, replace(one, preference=short), "preference")
        before = next(line for line in of_pairs.lines if line["split"] == "eval")
        after = {"split": "eval", "step": config.feedback.steps}
        after |= bench.evaluate(of_pairs, finished.params)
        whole = replace(finished, lines=[before, *_training(finished), after])
        rows.write(label, whole.row(config, "feedback", cell="kto_single"))
    rows.write("kto_single", {"learning_rate": rate})


def _training(finished: Finished) -> list[Mapping[str, Any]]:
    return [line for line in finished.lines if line["split"] == "train"]


def row_name(name: str, rate: float, seed: int) -> str:
    """The name of a run's row."""
    return f"{name}_{rate:.0e}_{seed}"


def runs_of(rows: Rows, name: str) -> list[dict[str, Any]]:
    """All runs of a loss, by seed and learning rate."""
    names = [x for x in rows.names() if x.startswith(f"{name}_")]
    runs = [row for row in (rows[x] for x in names) if row.get("cell") == name]
    return sorted(runs, key=lambda row: (row["seed"], row["learning_rate"]))


def best_rate(rows: Rows, name: str) -> float:
    """The rate of the first seed with the highest accuracy, a mean of the sweep splits.

    Of equal ones the lowest.
    """
    runs = runs_of(rows, name)
    first = [row for row in runs if row["seed"] == runs[0]["seed"]]
    if len(first) == 1:
        return first[0]["learning_rate"]
    return max(first, key=lambda row: np.mean(swept(row)))["learning_rate"]


def swept(row: Mapping[str, Any]) -> list[float]:
    """The accuracies on the sweep splits, by source."""
    return [ends(row, source, "rewards/accuracies", "sweep")[1] for source in SOURCES]


def cells() -> list[Cell]:
    """In the order of their importance."""
    losses = [
        Cell(
            study=STUDY,
            name=f"answers_{name}",
            run=functools.partial(compare, name=name),
            after="sft",
        )
        for name in LOSSES
    ]
    single = Cell(study=STUDY, name="kto_single", run=single_responses, after="answers_kto")
    asked = Cell(study=STUDY, name="answers_sft", run=first_answers, after="sft")
    return [Cell(study=STUDY, name="sft", run=sft), *losses, asked, single]


# ------------------------------------------------------------------------------ the page


def ends(
    row: Mapping[str, Any], source: str, metric: str, split: str = "test"
) -> tuple[float, float]:
    """A held-out metric of a source before and after a run."""
    values = row["held_out"][f"by_source/{source}_{split}/{metric}"]["value"]
    return values[0], values[-1]


def seeds_of(rows: Rows, name: str) -> list[dict[str, Any]]:
    """The runs of a loss with its best rate, one for every seed; empty: it was not run."""
    runs = runs_of(rows, name)
    if not runs:
        return []
    rate = best_rate(rows, name)
    return [row for row in runs if row["learning_rate"] == rate]


def with_interval(values: Sequence[float], form: str) -> str:
    """The mean, with its 95 % interval where there are several seeds."""
    text = form.format(np.mean(values))
    return text if len(values) == 1 else f"{text} ± {half_width(values):{form[-4:-1]}}"


def comparison(rows: Rows, source: str) -> str:
    """The table of a source."""
    lines = []
    for name in (*LOSSES, "kto_single"):
        if not (runs := seeds_of(rows, name)):
            continue

        def changes(metric: str, runs: Sequence[dict[str, Any]] = runs) -> list[float]:
            return [after - before for before, after in (ends(r, source, metric) for r in runs)]

        chosen, rejected = changes("logps/chosen"), changes("logps/rejected")
        margin = [a - b for a, b in zip(chosen, rejected, strict=True)]
        before = ends(runs[0], source, "logps/accuracies")[0]
        lines.append(
            [
                LABELS[name],
                f"{runs[0]['learning_rate']:.0e}",
                with_interval([ends(r, source, "rewards/accuracies")[1] for r in runs], "{:.3f}"),
                with_interval(margin, "{:+.2f}"),
                with_interval(chosen, "{:+.2f}"),
                with_interval(rejected, "{:+.2f}"),
                f"{before:.3f} → "
                + with_interval([ends(r, source, "logps/accuracies")[1] for r in runs], "{:.3f}"),
                with_interval([ends(r, source, "kl")[1] for r in runs], "{:.3f}"),
            ]
        )
    header = (
        "loss",
        "rate",
        "accuracy",
        "Δ margin (nats)",
        "Δ chosen",
        "Δ rejected",
        "P(chosen) > P(rejected)",
        "KL (nats/token)",
    )
    return table(header, lines)


def sweep(rows: Rows) -> str:
    """The table of learning rates: accuracies on the sweep splits, one seed; empty: one rate."""
    lines, rates = [], set[float]()
    for name in LOSSES:
        runs = runs_of(rows, name)
        first = [row for row in runs if row["seed"] == runs[0]["seed"]]
        rates |= {row["learning_rate"] for row in first}
        lines.append((name, {row["learning_rate"]: row for row in first}))
    if len(rates) < 2:
        return ""

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return ""
        both = swept(row)
        return f"{np.mean(both):.3f} ({both[0]:.2f}, {both[1]:.2f})"

    cells = [
        [LABELS[name], *(cell(found.get(rate)) for rate in sorted(rates))]
        for name, found in lines
        if found
    ]
    return table(("loss", *(f"{rate:.0e}" for rate in sorted(rates))), cells)


def answers(rows: Rows) -> str:
    """The table of answers: length, and how many end by themselves."""
    lines = []
    for name in ("base", "sft", *LOSSES):
        if f"answers_{name}" not in rows:
            continue
        given = rows[f"answers_{name}"]["answers"]
        words = [len(one["answer"].split()) for one in given]
        same = ""
        if name not in ("base", "sft") and "answers_sft" in rows:
            before = rows["answers_sft"]["answers"]
            same = f"{np.mean([_same_words(a, b) for a, b in zip(given, before, strict=True)]):.0%}"
        lines.append(
            [
                BASE if name == "base" else LABELS[name],
                f"{np.mean([one['tokens'] for one in given]):.0f}",
                f"{np.mean(words):.0f}",
                f"{sum(one['finished'] for one in given)} of {len(given)}",
                same,
                judged(rows, name),
            ]
        )
    header = ("model", "tokens", "words", "ended by itself", "first words as SFT's", "beats SFT")
    return table(header, lines)


def excerpts(rows: Rows) -> str:
    """The table of how some answers begin; empty: there are none."""
    names = [name for name in ("base", "sft", *LOSSES) if f"answers_{name}" in rows]
    if not names:
        return ""
    given = {name: rows[f"answers_{name}"]["answers"] for name in names}

    def beginning(text: str, words: int) -> str:
        every = text.replace("|", "\\|").split()
        return " ".join(every[:words]) + (" ..." if len(every) > words else "")

    questions = [beginning(given[names[0]][at]["question"], 14) for at in SHOWN]
    lines = [
        [BASE if name == "base" else LABELS[name]]
        + [beginning(given[name][at]["answer"], 36) for at in SHOWN]
        for name in names
    ]
    return table(("model", *questions), lines)


def readers(rows: Rows) -> str:
    """The table of what others say of the exported SFT model; empty: they were not asked."""
    if "exported" not in rows:
        return ""
    row = rows["exported"]
    lines = []
    for name, file in (("transformers", "folder"), ("llama.cpp", "GGUF file, float32")):
        one, apart = row[name], ""
        if name == "transformers":
            apart = f"{row['largest_difference']:.1e} nats of {row['tokens']:,} tokens"
        same = f"{one['same']} of {row['answers']}"
        lines.append([f"{name}, {file}", same, f"{one['same_beginning']:.0%}", apart])
    header = ("reader", "same answers", "same beginning", "largest difference of a log-prob")
    return table(header, lines)


def judged(rows: Rows, name: str) -> str:
    """The mean preference of the judge over the SFT model's answers; empty: it was not asked."""
    if f"judged_{name}" not in rows:
        return ""
    values = np.array(rows[f"judged_{name}"]["preference"], float)
    found = win_rate(values)
    low, high = found.bootstrap
    return f"{found.rate:.2f} ({low:.2f} to {high:.2f})"


def _same_words(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The fraction of an answer's words before the first that differs from another answer."""
    words, others = one["answer"].split(), other["answer"].split()
    for at, (word, known) in enumerate(zip(words, others, strict=False)):
        if word != known:
            return at / len(words)
    return 1.0


def plot(rows: Rows) -> None:
    """Change of chosen against change of rejected, and accuracy against KL, by source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for line, (source, label) in zip(axes, SOURCES.items(), strict=True):
        for number, name in enumerate((*LOSSES, "kto_single")):
            if not (runs := seeds_of(rows, name)):
                continue
            look = {"color": f"C{number}", "label": LABELS[name]}
            moved = {
                side: [b - a for a, b in (ends(run, source, f"logps/{side}") for run in runs)]
                for side in ("chosen", "rejected")
            }
            line[0].scatter(moved["rejected"], moved["chosen"], **look)
            line[1].scatter(
                [ends(run, source, "kl")[1] for run in runs],
                [ends(run, source, "rewards/accuracies")[1] for run in runs],
                **look,
            )
        low = min(line[0].get_xlim()[0], line[0].get_ylim()[0])
        line[0].plot([low, 0], [low, 0], color="grey", linewidth=0.8)
        line[0].axhline(0, color="grey", linewidth=0.8)
        line[0].set(title=label, xlabel="change of rejected (nats)")
        line[0].set_ylabel("change of chosen (nats)")
        line[1].set(title=label, xlabel="KL to the SFT model (nats/token)", ylabel="accuracy")
        for axis in line:
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(FOLDER / "small.png", dpi=100)
    plt.close(figure)


def main() -> None:
    """Write the section and the figure from the rows."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    rows = Rows(folder=flags.parse_args().rows)
    parts = [f"Held-out {SOURCES[x]}:\n\n{comparison(rows, x)}" for x in SOURCES]
    held_out = "\n".join([*parts, "![before and after](small.png)"])
    text = "\n".join([sweep(rows), answers(rows), readers(rows), excerpts(rows)])
    print(f"{held_out}\n\n{text}")
    plot(rows)
    put(FOLDER, "small", held_out)
    put(FOLDER, "small answers", text)


if __name__ == "__main__":
    main()
