"""Twelve losses, two optimisers and the mitigations on a real chat model, every step watched.

Command:  python -m experiments.small --model FOLDER --second GEMMA --cells gradient_entanglement
          python -m experiments.gradient_entanglement.small --rows ROWS --model FOLDER
Time:     of a model of 135 million parameters, minutes on an H100, two days on two CPU cores
Expect:   the section "A real chat model" of this folder's README, and its figures

All parameters, in float32, of a chat model as it was published; batches of 8 pairs. Polite and
impolite answers share most of their tokens, those of UltraFeedback few. Every step has the exact
geometry of its pairs; every fourth has a ledger, every one in the run that is shown.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cells import Cell
from experiments.gradient_entanglement import findings
from experiments.gradient_entanglement.preference import LOSSES
from experiments.gradient_entanglement.small_rows import (
    at_accuracy,
    change,
    held_out,
    mean,
    outcome,
    per_step,
)
from experiments.page import half_width, put, table
from experiments.rows import Rows
from experiments.short_runs import Bench, Options
from jaxalign.config import EntanglementConfig, OptimizerConfig, TrainConfig
from jaxalign.data import preference_records
from jaxalign.entanglement.pairs import load_pairs, with_pairs
from jaxalign.entanglement.similarity import least_similar, similarities
from jaxalign.entanglement.tokens import token_geometry
from jaxalign.files import write_json_lines
from jaxalign.reporting import heat_map
from jaxalign.reporting.charts import Chart, Series, draw
from jaxalign.reporting.ledger import PARTS
from jaxalign.rows import ResponseRows
from jaxalign.stages.models import as_model

Rule = Literal["adamw", "sgd"]

FOLDER = Path(__file__).parent
STUDY = "gradient_entanglement"
SOURCES = {"polite": "polite pairs", "ultrafeedback": "UltraFeedback"}
LENGTH = {"polite": 128, "ultrafeedback": 256}
"""Most tokens of prompt and response; longer responses are cut."""
ORDER = (
    *("dpo", "simpo", "ipo", "kto", "cpo", "rpo"),
    *("dpop", "rrhf", "slic", "sppo", "orpo", "rdpo"),
)
"""The losses, the most important first."""
FEW = ("dpo", "simpo", "cpo")
"""Losses that the second model is trained with."""
RATES: dict[Rule, float] = {"adamw": 2e-5, "sgd": 2e-2}
STEPS: dict[Rule, int] = {"adamw": 48, "sgd": 32}
PAIRS, HELD_OUT = 8, 96
CURES: dict[str, tuple[str, dict[str, float], EntanglementConfig]] = {
    "normalised": ("dpo", {"beta": 0.1}, EntanglementConfig(every=1, reweighting="normalised")),
    "centred": ("dpo", {"beta": 0.1}, EntanglementConfig(every=1, reweighting="centred")),
    "differing": ("dpo", {"beta": 0.1}, EntanglementConfig(every=1, mask="differing")),
    "shift": ("dpo_shift", {"beta": 0.1}, EntanglementConfig(every=1)),
    "cal": ("cal_dpo", {}, EntanglementConfig(every=1)),
}
"""Mitigation -> loss, its hyperparameters, and what is done to its gradients or tokens."""
SHOWN = "dpo_adamw_polite"
"""The run whose ledger is shown, step by step."""
SEEDS = (1, 2)
"""Other orders of the pairs, in which the run that is shown is made again."""
KEPT = 0.5
"""Fraction of the pairs that the filter by similarity keeps."""


def watched(*, always: bool) -> EntanglementConfig:
    """The statistics of a run, with a ledger of every step or of every fourth."""
    return EntanglementConfig(every=1, ledger=1 if always else 4)


def settings(
    bench: Bench,
    name: str,
    loss: str,
    options: Mapping[str, float],
    *,
    source: str = "polite",
    rule: Rule = "adamw",
    watch: EntanglementConfig,
    train: str | None = None,
    seed: int = 0,
) -> TrainConfig:
    """A run from the published model.

    Args:
      bench: of the runs.
      name: of the run.
      loss: its name.
      options: its hyperparameters.
      source: of the pairs.
      rule: the optimiser.
      watch: statistics and mitigations.
      train: file to train on, in place of the source's split.
      seed: of the order of the pairs.
    """
    steps = bench.options.steps or STEPS[rule]
    stage = bench.preference(
        loss=loss,
        loss_options=dict(options),
        batch_size=bench.options.pairs or PAIRS,
        steps=steps,
        eval_every=max(1, steps // 6),
        optimizer=OptimizerConfig(
            name=rule, learning_rate=RATES[rule], schedule="constant", warmup_fraction=0.1
        ),
        entanglement=watch,
    )
    return TrainConfig(
        name=f"entanglement_{name}",
        model=bench.options.model,
        data=train or bench.options.data(source, "train"),
        eval_data=bench.options.data(source, "test"),
        max_length=bench.options.max_length or LENGTH[source],
        max_eval_records=min(HELD_OUT, bench.options.held_out),
        bad_records="skip",
        preference=stage,
        remat="full" if bench.is_gpu else "dots",
        export=False,
        seed=seed,
    )


def train(bench: Bench, name: str, model: str | None = None, **options: Any) -> None:
    """A run and its row.

    Args:
      bench: of the runs.
      name: of the row.
      model: other than the chat model.
      **options: of `settings`.
    """
    config = settings(bench, name, **options)
    finished = bench.run(bench.model(model or config.model), config, "preference", buckets=1)
    names = {x: options[x] for x in ("source",) if x in options}
    bench.rows(STUDY).write(name, finished.row(config, "preference", **names))


def filtered(bench: Bench, name: str, lowest: bool) -> None:
    """DPO of half of the pairs: those with the lowest CHES, or as many that are drawn."""
    source = "polite"
    start = bench.model(bench.options.model)
    records = list(preference_records(bench.options.data(source, "train")))
    if bench.options.steps is not None:  # half of them are used once or twice
        records = records[: 4 * bench.options.steps * PAIRS]
    loaded = with_pairs(
        as_model(start.config, start.params),
        start.tokenizer,
        records,
        max_length=LENGTH[source],
        batch_size=PAIRS,
    )
    scores = similarities(loaded)["ln_ches"]
    if lowest:
        kept = least_similar(scores, KEPT)
    else:
        number = int(np.ceil(KEPT * len(scores)))
        kept = np.sort(np.random.default_rng(0).permutation(len(scores))[:number])
    path = bench.options.output / "data" / f"{name}.jsonl"
    used = [loaded.records[int(loaded.pairs.record_index[at])] for at in kept]
    fields = ("prompt", "chosen", "rejected")
    write_json_lines(path, [{x: getattr(r, x) for x in fields} for r in used])
    train(
        bench, name, loss="dpo", options=LOSSES["dpo"], watch=watched(always=False), train=str(path)
    )


def cells(second: str | None) -> list[Cell]:
    """In the order of their importance.

    Args:
      second: a model of another family; None: there is none.
    """

    def cell(name: str, loss: str, **options: Any) -> Cell:
        given = {
            "loss": loss,
            "options": LOSSES[loss],
            "watch": watched(always=name == SHOWN),
            **options,
        }
        run = functools.partial(train, name=name, **given)
        return Cell(study=STUDY, name=name, run=run)

    def of_source(losses: Sequence[str], rule: Rule, source: str) -> list[Cell]:
        return [cell(f"{loss}_{rule}_{source}", loss, rule=rule, source=source) for loss in losses]

    cures = [
        Cell(
            study=STUDY,
            name=f"cure_{name}",
            run=functools.partial(
                train, name=f"cure_{name}", loss=loss, options=options, watch=watch
            ),
        )
        for name, (loss, options, watch) in CURES.items()
    ]
    filters = [
        Cell(study=STUDY, name=name, run=functools.partial(filtered, name=name, lowest=lowest))
        for name, lowest in (("ches_lowest", True), ("ches_drawn", False))
    ]
    other = [cell(f"second_{x}", x, model=second, rule="adamw") for x in FEW] if second else []
    seeds = [cell(f"{SHOWN}_{seed}", "dpo", seed=seed) for seed in SEEDS]
    half = ORDER[:6]
    return [
        *of_source(ORDER, "adamw", "polite"),
        *of_source(half, "sgd", "polite"),
        *of_source(half[:4], "adamw", "ultrafeedback"),
        *cures[:3],
        *other,
        *of_source(ORDER[6:], "sgd", "polite"),
        *filters,
        *cures[3:],
        *of_source(ORDER[4:], "adamw", "ultrafeedback"),
        *seeds,
    ]


# ------------------------------------------------------------------------------ the page


def losses(rows: Rows, rule: str, source: str, prefix: str = "") -> str:
    """The table of the losses that were run."""
    lines = []
    for loss in ORDER:
        name = f"{prefix}{loss}" if prefix else f"{loss}_{rule}_{source}"
        if name not in rows:
            continue
        row = rows[name]
        weights = mean(row, "d_w"), mean(row, "d_l")
        shares = [mean(row, x) for x in ("ideal", "both_down", "both_up", "reversed")]
        lines.append(
            [
                loss,
                f"{held_out(row, 'rewards/accuracies')[-1]:.3f}",
                f"{held_out(row, 'logps/accuracies')[-1]:.3f}",
                f"{change(row, 'chosen')[-1]:+.2f}",
                f"{change(row, 'rejected')[-1]:+.2f}",
                outcome(row),
                f"{mean(row, 'cosine'):.2f}",
                f"{weights[0] / weights[1]:.3g}" if weights[1] else "∞",
                *(f"{share:.0%}" for share in shares),
                *(
                    f"{per_step(row, part, 'chosen', 'held_out/'):+.3f}"
                    for part in ("others", "optimiser", "curvature")
                ),
            ]
        )
    header = (
        *("loss", "accuracy", "P(chosen) > P(rejected)", "Δ chosen (nats)", "Δ rejected"),
        *("held-out outcome", "cosine", "d_w / d_l", "pairs' own case: ideal", "both down"),
        *("both up", "reversed", "held-out chosen per step: other pairs"),
        *("optimiser", "curvature"),
    )
    return table(header, lines)


def orders(rows: Rows) -> str:
    """The table of the run that is shown, in every order of the pairs that was run."""
    names = [name for name in (SHOWN, *(f"{SHOWN}_{seed}" for seed in SEEDS)) if name in rows]
    found = [rows[name] for name in names]
    measured = {
        "accuracy": [held_out(row, "rewards/accuracies")[-1] for row in found],
        "Δ chosen (nats)": [change(row, "chosen")[-1] for row in found],
        "Δ rejected": [change(row, "rejected")[-1] for row in found],
        "cosine": [mean(row, "cosine") for row in found],
        "pairs' own case: ideal": [mean(row, "ideal") for row in found],
    } | {
        f"held-out chosen per step: {label}": [
            per_step(row, part, "chosen", "held_out/") for row in found
        ]
        for part, label in (
            ("others", "other pairs"),
            ("optimiser", "optimiser"),
            ("curvature", "curvature"),
        )
    }
    lines = [
        [
            name,
            *(f"{value:.3f}" for value in values),
            f"{np.mean(values):.3f} ± {half_width(values):.3f}",
        ]
        for name, values in measured.items()
    ]
    columns = [f"order {number}" for number in range(1, len(found) + 1)]
    return table(("dpo, adamw, polite pairs", *columns, "mean"), lines)


def ledger(row: Mapping[str, Any]) -> str:
    """The table of the parts of a run's changes, summed over its steps."""
    lines = []
    for part, (_, label) in PARTS.items():
        sums = []
        for pairs_of in ("", "held_out/"):
            for side in ("chosen", "rejected"):
                one = row["training"].get(f"entanglement/ledger/{pairs_of}{part}_{side}")
                sums.append(f"{np.sum(one['value']):+.2f}" if one else "")
        lines.append([label, *sums])
    columns = [
        f"{side}, {pairs}"
        for pairs in ("pairs of the batch", "held-out pairs")
        for side in ("chosen", "rejected")
    ]
    title = f"{row['loss']}, {row['optimizer']}, sum over {row['steps']} steps"
    return table((title, *columns), lines)


MITIGATIONS = {
    "dpo_adamw_polite": "DPO",
    "cure_normalised": "DPO, normalised gradients",
    "cure_centred": "DPO, centred coefficients",
    "cure_differing": "DPO, differing tokens",
    "cure_shift": "DPO-Shift",
    "cure_cal": "Cal-DPO",
    "dpop_adamw_polite": "DPOP",
    "rpo_adamw_polite": "RPO",
    "ches_lowest": "DPO, half of the pairs with the lowest CHES",
    "ches_drawn": "DPO, half of the pairs, drawn",
}
"""Row -> its name in the table of mitigations."""


def mitigations(rows: Rows, accuracy: float) -> str:
    """The table of mitigations at the same held-out accuracy, and at the end."""
    lines = []
    for name, label in MITIGATIONS.items():
        if name not in rows:
            continue
        row = rows[name]
        at = at_accuracy(row, accuracy)
        lines.append(
            [
                label,
                *(
                    [f"{at['step']:.0f}", f"{at['chosen']:+.2f}", f"{at['rejected']:+.2f}"]
                    if at
                    else ["not reached", "", ""]
                ),
                f"{held_out(row, 'rewards/accuracies')[-1]:.3f}",
                f"{change(row, 'chosen')[-1]:+.2f}",
                f"{change(row, 'rejected')[-1]:+.2f}",
                f"{mean(row, 'cosine'):.2f}",
                f"{mean(row, 'ideal'):.0%}",
            ]
        )
    header = (
        "",
        f"step with accuracy {accuracy:.2f}",
        *("Δ chosen there", "Δ rejected there"),
        *("accuracy at the end", "Δ chosen", "Δ rejected", "cosine", "own case: ideal"),
    )
    return table(header, lines)


def explaining(row: Mapping[str, Any]) -> list[Chart]:
    """The pairs' own cases, the held-out log-probs, and the ledger's sums beside each other."""
    cases = [
        Series(
            x=row["training"][f"entanglement/{case}"]["step"],
            y=[100 * y for y in row["training"][f"entanglement/{case}"]["value"]],
            label=label,
            colour=colour,
        )
        for case, label, colour in (
            ("ideal", "ideal: chosen up, rejected down", "#4c9f70"),
            ("both_down", "both down", "#c44e52"),
        )
    ]
    steps = row["held_out"]["logps/chosen"]["step"]
    curves = [
        Series(x=steps, y=change(row, side).tolist(), label=side, colour=colour, dots=True)
        for side, colour in (("chosen", "#4c9f70"), ("rejected", "#c44e52"))
    ]
    sums = []
    for pairs_of, label in (("", "pairs of the batch"), ("held_out/", "held-out pairs")):
        series = []
        for part, (colour, name) in PARTS.items():
            one = row["training"].get(f"entanglement/ledger/{pairs_of}{part}_chosen")
            if one:
                whole = part == "realised"
                values = np.cumsum(one["value"]).tolist()
                series.append(
                    Series(x=one["step"], y=values, label=name, colour=colour, dashed=whole)
                )
        sums.append(
            Chart(
                title=f"why chosen moves: {label}",
                series=series,
                y_label="sum of changes (nats)",
                rule=0.0,
            )
        )
    return [
        Chart(
            title="what each pair's own step would do",
            series=cases,
            y_label="% of the batch",
            y_range=(0, 102),
        ),
        Chart(
            title="what happens to held-out pairs",
            series=curves,
            y_label="change of log-prob (nats)",
            rule=0.0,
        ),
        *sums,
    ]


def plot_losses(rows: Rows) -> None:
    """Held-out log-probs of every loss, by optimiser, source and model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [("adamw", "polite"), ("sgd", "polite"), ("adamw", "ultrafeedback")]
    runs = {
        f"{loss}_{rule}_{source}": f"{loss}, {rule}, {SOURCES[source]}"
        for rule, source in kinds
        for loss in ORDER
    }
    runs |= {f"second_{loss}": f"{loss}, adamw, polite pairs,\nGemma 3 270M" for loss in FEW}
    found = {name: title for name, title in runs.items() if name in rows}
    columns = min(6, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.2 * columns, 1.9 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, title) in zip(axes.flat, found.items(), strict=False):
        row = rows[name]
        axis.set_axis_on()
        for side, colour in (("chosen", "#4c9f70"), ("rejected", "#c44e52")):
            steps = row["held_out"][f"logps/{side}"]["step"]
            axis.plot(steps, change(row, side), color=colour, label=side)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(title, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("nats", fontsize=7)
    figure.savefig(FOLDER / "small_losses.png", dpi=90)
    plt.close(figure)


def draw_pair(model: str, data: str, number: int) -> None:
    """Token against token for a pair.

    Args:
      model: before any training.
      data: source of the pairs.
      number: of the pair, from 1.
    """
    loaded = load_pairs(model, data, max_length=LENGTH["polite"], limit=number, batch_size=1)
    batch, tokenizer = loaded.batches()[-1], loaded.tokenizer
    pair = ResponseRows(
        tokens=batch.tokens[0],
        prompt_length=batch.prompt_length[0],
        response_tokens=batch.response_tokens[0],
        response_length=batch.response_length[0],
    )
    geometry = jax.jit(lambda params, pair: token_geometry(params, loaded.model.config, pair))
    cosines = np.asarray(geometry(loaded.model.params, jax.tree.map(jnp.asarray, pair)).cosine)
    length = batch.response_length[0]
    chosen, rejected = (
        tokenizer.convert_ids_to_tokens(batch.response_tokens[0][side, : length[side]])
        for side in (0, 1)
    )
    heat_map.draw(
        cosines[: length[0], : length[1]],
        chosen,
        rejected,
        FOLDER / "small_heat_map.png",
        title="a polite and an impolite answer, before training",
    )


def main() -> None:
    """Write the section and the figures from the rows."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    flags.add_argument("--accuracy", type=float, default=0.8, help="at which to compare")
    flags.add_argument("--model", help="draw the tokens of a pair by this model, too")
    flags.add_argument("--data", default=Options(model="").polite, help="source of that pair")
    flags.add_argument("--pair", type=int, default=1, help="its number")
    given = flags.parse_args()
    rows = Rows(folder=given.rows)
    if given.model:
        draw_pair(given.model, given.data, given.pair)
    shown = rows[SHOWN]
    draw(explaining(shown), FOLDER / "small.png", size=(3.6, 3.4))
    plot_losses(rows)
    found = f"{findings.page(rows, given.accuracy)}\n![DPO, step by step](small.png)"
    parts = [ledger(shown)]
    if any(f"{SHOWN}_{seed}" in rows for seed in SEEDS):
        parts.append(orders(rows))
    for rule, source in (("adamw", "polite"), ("sgd", "polite"), ("adamw", "ultrafeedback")):
        if any(f"{loss}_{rule}_{source}" in rows for loss in ORDER):
            name = {"adamw": "AdamW", "sgd": "SGD"}[rule]
            parts.append(f"{name}, {SOURCES[source]}:\n\n{losses(rows, rule, source)}")
    if any(f"second_{loss}" in rows for loss in FEW):
        parts.append(
            f"Gemma 3 270M, AdamW, polite pairs:\n\n{losses(rows, 'adamw', 'polite', 'second_')}"
        )
    parts += ["![losses](small_losses.png)\n", mitigations(rows, given.accuracy)]
    text = "\n".join(parts)
    print(f"{found}\n\n{text}")
    put(FOLDER, "small findings", found)
    put(FOLDER, "small", text)


if __name__ == "__main__":
    main()
