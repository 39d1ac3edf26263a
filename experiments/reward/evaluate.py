"""The README's table: held-out accuracy, calibration, order, and cycles of trained models.

Command:  python -m experiments.reward.evaluate RUN [RUN ...]
Time:     about a minute for each run on two CPU cores
"""

import sys
from pathlib import Path

import numpy as np

from jaxalign.data import preference_records, split_holdout
from jaxalign.evaluation import make_annotator
from jaxalign.evaluation.sampled_cycles import sampled_cycles
from jaxalign.stages.models import read_run_config
from jaxalign.stages.scores import MODELS
from jaxalign.training.calibration import reliability

HEADER = ("run", "pairs", "accuracy", "ECE", "orders agree", "P(shown first)", "cycles of triples")


def row(run: Path, triples: int = 1000) -> list[str]:
    """What is measured of one run, on the prompts that it held out."""
    config = read_run_config(run)
    records = list(preference_records(config.data[0], bad_records="skip"))
    held_out = split_holdout(records, config.holdout, seed=config.seed)[1]
    annotator = make_annotator(f"{MODELS[config.preference.loss]}:{run}")
    texts = [[str(record.prompt), str(record.chosen), str(record.rejected)] for record in held_out]
    verdicts = annotator.preferences(*map(list, zip(*texts, strict=True)))
    answers: dict[str, list[str]] = {}
    for prompt, *both in texts:
        answers.setdefault(prompt, []).extend(both)
    found = sampled_cycles(annotator, list(answers), list(answers.values()), triples=triples)
    p = verdicts.preference
    accuracy = float(np.mean((p > 0.5) + 0.5 * (p == 0.5)))
    error = 1.96 * (accuracy * (1 - accuracy) / len(p)) ** 0.5
    agree, first = verdicts.order_consistency, verdicts.first_position_rate
    return [
        run.name,
        str(len(p)),
        f"{accuracy:.3f} ± {error:.3f}",
        f"{reliability(p).error:.3f}",
        "" if agree is None else f"{agree:.3f}",
        "" if first is None else f"{first:.3f}",
        f"{found.cyclic} of {found.triples}",
    ]


def main(runs: list[str]) -> None:
    """Print the table in Markdown."""
    print("| " + " | ".join(HEADER) + " |")
    print("|---|" + "---:|" * (len(HEADER) - 1))
    for run in runs:
        print("| " + " | ".join(row(Path(run))) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
