"""Every loss of the paper's table on the same real pairs from the same start, SGD and AdamW.

Command:  python -m experiments.gradient_entanglement.preference [--model FOLDER] [--scale paper]
Time:     three quarters of an hour on two CPU cores
Expect:   the tables of the section "Losses" of this folder's README, and losses.png

First what the condition promises: for each of 32 pairs and each loss one small step of plain
gradient descent on that pair alone, from the SFT model moved a little off the reference. Then a run
of each loss with either optimiser, every second or fourth step watched: the pair's own condition,
beside what the update of the whole batch did to the pair.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.gradient_entanglement.pairs import arguments, settings
from experiments.page import put, table
from experiments.runs import DATA, change, curve, finished, mean
from jaxalign.config import EntanglementConfig
from jaxalign.data import load_tokenizer, pair_batches, preference_records, tokenize_pairs
from jaxalign.entanglement import CASES, PairGeometry, case, coefficients
from jaxalign.entanglement.conditions import case_of_changes
from jaxalign.entanglement.geometry import gram
from jaxalign.losses import PREFERENCE_LOSSES, PairLogProbs
from jaxalign.models import load_pretrained
from jaxalign.models.responses import response_log_probs
from jaxalign.reporting import read_run
from jaxalign.rows import ResponseRows

FOLDER = Path(__file__).parent

LOSSES: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.2},
    "ipo": {"tau": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "rrhf": {},
    "slic": {},
    "cpo": {},
    "dpop": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "sppo": {},
    "orpo": {},
    "rpo": {"beta": 0.1},
}
"""The paper's table, with ORPO and RPO beside; hyperparameters not named are the table's own."""

PAIRS, STEP = 32, 0.05
"""Pairs that are stepped on alone; the change of the log-probs' sum in nats that a step aims at."""


def one_by_one(folder: str) -> dict[str, tuple[dict[str, float], float]]:
    """Loss -> (share of pairs in each case, share whose own small step did what its case says)."""
    model, tokenizer = load_pretrained(folder, dtype=jnp.float32), load_tokenizer(folder)
    source = DATA / "preferences" / "rasbt_instruction_preference.jsonl"
    records = list(preference_records(str(source), bad_records="skip"))[:PAIRS]
    pairs, _ = tokenize_pairs(records, tokenizer, max_length=96)
    batch = next(pair_batches(pairs, batch_size=len(pairs), epochs=1, shuffle=False))
    noise = jax.random.split(jax.random.key(0), len(jax.tree.leaves(model.params)))
    noise = jax.tree.unflatten(jax.tree.structure(model.params), list(noise))
    params = jax.tree.map(  # off the reference, so that coefficients differ between pairs
        lambda x, key: x + 0.02 * jnp.std(x) * jax.random.normal(key, x.shape), model.params, noise
    )

    @jax.jit
    def log_probs(params, pair: ResponseRows) -> Array:
        return response_log_probs(params, model.config, pair).log_prob.sum(-1)

    @jax.jit
    def gradients(params, pair: ResponseRows):
        values, backward = jax.vjp(lambda p: log_probs(p, pair), params)
        chosen, rejected = (backward(side)[0] for side in jnp.eye(2))
        return values, chosen, rejected, gram(chosen, rejected)

    @jax.jit
    def stepped(params, chosen, rejected, pair: ResponseRows, up: Array, down: Array):
        moved = jax.tree.map(lambda x, g, h: x + up * g - down * h, params, chosen, rejected)
        return log_probs(moved, pair)

    found: dict[str, list[tuple[int, bool]]] = {name: [] for name in LOSSES}
    for row in range(len(batch.weight)):
        pair = jax.tree.map(lambda x, row=row: jnp.asarray(x[row : row + 1]), batch).rows()
        reference = log_probs(model.params, pair)
        values, chosen, rejected, numbers = gradients(params, pair)
        of_pair = (number[None] for number in numbers)
        geometry = PairGeometry(**dict(zip(("chosen", "rejected", "inner"), of_pair, strict=True)))
        lengths = pair.response_length
        of_loss = PairLogProbs(
            chosen=values[:1],
            rejected=values[1:],
            reference_chosen=reference[:1],
            reference_rejected=reference[1:],
            chosen_length=lengths[:1],
            rejected_length=lengths[1:],
        )
        for name, options in LOSSES.items():
            weights = coefficients(PREFERENCE_LOSSES[name], of_loss, **options)
            predicted = int(case(geometry, weights)[0])
            up, down = weights.chosen[0], weights.rejected[0]
            size = jnp.sqrt(up**2 * numbers[0] + down**2 * numbers[1]) * jnp.sqrt(
                numbers[0] + numbers[1]
            )
            rate = STEP / jnp.maximum(size, 1e-30)
            after = stepped(params, chosen, rejected, pair, rate * up, rate * down)
            realised = int(case_of_changes(*(after - values)[:, None])[0])
            found[name].append((predicted, realised == predicted))
    shares = {}
    for name, results in found.items():
        cases = np.array([number for number, _ in results])
        of_case = {label: float(np.mean(cases == i)) for i, label in enumerate(CASES)}
        shares[name] = of_case, float(np.mean([right for _, right in results]))
    return shares


def config_of(loss: str, rule: str, start: str, scale: str):
    """A run of a loss with an optimiser; AdamW's own geometry beside the plain one."""
    every = 2 if rule == "sgd" else 4
    watch = EntanglementConfig(every=every, realised=True, preconditioned=rule == "adamw")
    name = f"{loss}_{rule}"
    return settings(name, start, scale, loss, LOSSES[loss], rule=rule, entanglement=watch)


def same_sign(folder: Path, geometry: str = "") -> float:
    """Share of watched batches whose mean changes have the signs that the pairs' own means have.

    Batches in which no pair has a prediction (no gradient is left) are not counted.
    """
    right: dict[int, bool] = {}
    for side in ("chosen", "rejected"):
        realised = dict(zip(*curve(folder, f"realised_{side}"), strict=True))
        for step, predicted in zip(*curve(folder, f"{geometry}predicted_{side}"), strict=True):
            same = bool(np.sign(predicted) == np.sign(realised[step]))
            right[step] = right.get(step, True) and same
    return float(np.mean(list(right.values())))


def outcome(folder: Path) -> str:
    """Where the held-out log-probs went, as one of the cases."""
    chosen, rejected = (change(folder, f"logps/{side}") for side in ("chosen", "rejected"))
    return CASES[int(case_of_changes(jnp.array([chosen]), jnp.array([rejected]))[0])]


HEADER = (
    "loss",
    "accuracy",
    "Δ chosen (nats)",
    "Δ rejected",
    "held-out outcome",
    "cosine",
    "d_w / d_l",
    "pairs' own case: ideal",
    "both down",
    "both up",
    "pairs that did as their case says",
    "batches",
)
IN_UPDATE: tuple[tuple[str, str, Callable[[Path], float]], ...] = (
    ("AdamW's cosine", "{:.2f}", lambda folder: mean(folder, "adamw/cosine")),
    ("pairs, by AdamW's geometry", "{:.0%}", lambda folder: mean(folder, "adamw/case_agreement")),
    ("batches", "{:.0%}", lambda folder: same_sign(folder, "adamw/")),
)


def row(name: str, folder: Path) -> list[str]:
    """A run as a row of the table."""
    accuracy = read_run(folder).first_and_last("preference", "rewards/accuracies")
    rejected = mean(folder, "d_l")
    return [
        name,
        f"{accuracy[1]:.3f}" if accuracy else "",
        f"{change(folder, 'logps/chosen'):+.2f}",
        f"{change(folder, 'logps/rejected'):+.2f}",
        outcome(folder),
        f"{mean(folder, 'cosine'):.3f}",
        f"{mean(folder, 'd_w') / rejected:.3g}" if rejected else "∞",
        f"{mean(folder, 'ideal'):.0%}",
        f"{mean(folder, 'both_down'):.0%}",
        f"{mean(folder, 'both_up'):.0%}",
        f"{mean(folder, 'case_agreement'):.0%}",
        f"{same_sign(folder):.0%}",
    ]


def plot(runs: dict[str, dict[str, Path]]) -> None:
    """Held-out log-probs of every loss as changes from the start, two rows per optimiser."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = -(-len(LOSSES) // 2)
    rows = 2 * len(runs)
    figure, axes = plt.subplots(
        rows,
        width,
        figsize=(2.3 * width, 2 * rows),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for block, (rule, folders) in enumerate(runs.items()):
        for number, (loss, folder) in enumerate(folders.items()):
            axis = axes[2 * block + number // width, number % width]
            for side, colour in (("chosen", "#4c9f70"), ("rejected", "#c44e52")):
                steps, values = read_run(folder).curve("preference", "eval", f"logps/{side}")
                axis.plot(steps, np.array(values) - values[0], color=colour, label=side)
            axis.axhline(0, color="grey", linewidth=0.8)
            axis.set_title(f"{loss}, {rule}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("change in nats", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.savefig(FOLDER / "losses.png", dpi=90)
    plt.close(figure)


def main() -> None:
    """Run what is missing, then write the sections and the figure."""
    start, scale = arguments(__doc__)
    cases = "ideal", "both down", "both up"
    rows = [
        [name, *(f"{shares[label]:.0%}" for label in cases), f"{right:.0%}"]
        for name, (shares, right) in one_by_one(start).items()
    ]
    alone = table(("loss", *cases, "steps that did as the case says"), rows)
    print(alone)
    put(FOLDER, "alone", alone)
    runs: dict[str, dict[str, Path]] = {}
    for rule in ("sgd", "adamw"):
        folders = {loss: finished(config_of(loss, rule, start, scale)) for loss in LOSSES}
        extra = IN_UPDATE if rule == "adamw" else ()
        rows = [
            row(loss, folder) + [form.format(function(folder)) for _, form, function in extra]
            for loss, folder in folders.items()
        ]
        found = table((*HEADER, *(name for name, _, _ in extra)), rows)
        print(found)
        put(FOLDER, rule, found)
        runs[rule] = folders
        plot(runs)


if __name__ == "__main__":
    main()
