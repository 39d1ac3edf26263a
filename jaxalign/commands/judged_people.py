"""A judge beside people's labels: the part of `jaxalign judge` that measures judges."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.commands.judged_examples import against_people
from jaxalign.commands.judged_words import headings, in_numbers, in_words, plain
from jaxalign.evaluation import Agreement, Annotator, agreement
from jaxalign.evaluation.outputs import Labelled
from jaxalign.files import open_text
from jaxalign.reporting.judging_page import Examples, Intervals, Table

HEADER = ("kappa", "ties", "judged", "no verdict")


def beside_people(
    annotator: Annotator,
    labelled: Sequence[Labelled],
    given: argparse.Namespace,
    results: dict[str, Any],
) -> list[Table | Intervals | Examples]:
    """How far the judge agrees with labels; the folder gets each verdict."""
    columns = [(x.prompt, x.first, x.second) for x in labelled]
    verdicts = annotator.preferences(*map(list, zip(*columns, strict=True)))
    label = np.array([x.label for x in labelled])
    groups = {"all": np.ones(len(labelled), bool)}
    for name in dict.fromkeys(x.group for x in labelled if x.group):
        groups[name] = np.array([x.group == name for x in labelled])
    found = {
        name: agreement(verdicts.preference[of], label[of], confidence=given.confidence)
        for name, of in groups.items()
    }
    with open_text(given.output / "human.jsonl", "w") as file:
        for number, row in enumerate(labelled):
            verdict = {
                "preference": verdicts.preference[number],
                "by_order": None if verdicts.by_order is None else verdicts.by_order[number],
                "reason": verdicts.reasons[number],
            }
            line = plain(dataclasses.asdict(row) | verdict)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    results["human"] = {name: dataclasses.asdict(x) for name, x in found.items()}
    results["human_judging"] = in_numbers(verdicts)
    notes = results.setdefault("notes", [])
    notes += in_words(verdicts)
    if not found["all"].interval[0] > 0.5:
        notes.append(
            "the judge does no better than chance on these labels: its win rates say little"
        )
    return [
        Table(
            title="Agreement with people",
            header=[
                "comparisons",
                "accuracy",
                *headings(given),
                "kappa",
                "ties",
                "judged",
                "no verdict",
            ],
            rows=[[name, *_agreement_cells(x)] for name, x in found.items()],
            note="Accuracy: share of the labelled winners that the judge found, its ties by "
            "halves. Kappa: Cohen's, each comparison in both orders; 0 is chance.",
        ),
        *against_people(labelled, verdicts, given.examples),
    ]


def _agreement_cells(found: Agreement) -> list[str]:
    low, high = found.interval
    interval = f"{low:.3f} – {high:.3f}"
    counts = map(str, (found.ties, found.number, found.failures))
    return [f"{found.accuracy:.3f}", interval, f"{found.kappa:.3f}", *counts]
