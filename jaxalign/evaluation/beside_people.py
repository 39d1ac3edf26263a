"""A judge beside people's labels: how far it agrees with them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxalign.evaluation.agreement import Agreement, agreement
from jaxalign.evaluation.annotators import Annotator
from jaxalign.evaluation.examples import against_people
from jaxalign.evaluation.judging import Findings, JudgingOptions, order_and_failures
from jaxalign.evaluation.outputs import Labelled
from jaxalign.files import json_value, write_json_lines
from jaxalign.reporting.judging_page import Table


def beside_people(
    annotator: Annotator, labelled: Sequence[Labelled], options: JudgingOptions, folder: Path
) -> Findings:
    """Judge what people have judged, and compare the verdicts.

    Args:
      annotator: the judge.
      labelled: comparisons with people's verdicts.
      options: of the summary.
      folder: gets each verdict, in human.jsonl.
    """
    columns = [(x.prompt, x.first, x.second) for x in labelled]
    verdicts = annotator.preferences(*map(list, zip(*columns, strict=True)))
    label = np.array([x.label for x in labelled])
    groups = {"all": np.ones(len(labelled), bool)}
    for name in dict.fromkeys(x.group for x in labelled if x.group):
        groups[name] = np.array([x.group == name for x in labelled])
    agreements = {
        name: agreement(verdicts.preference[group], label[group], confidence=options.confidence)
        for name, group in groups.items()
    }
    rows = []
    for number, row in enumerate(labelled):
        verdict = {
            "preference": verdicts.preference[number],
            "by_order": None if verdicts.by_order is None else verdicts.by_order[number],
            "reason": verdicts.reasons[number],
        }
        rows.append(json_value(dataclasses.asdict(row) | verdict))
    write_json_lines(folder / "human.jsonl", rows)
    judging, notes = order_and_failures(verdicts)
    if not agreements["all"].interval[0] > 0.5:
        notes.append(
            "the judge does no better than chance on these labels: its win rates say little"
        )
    return Findings(
        results={
            "human": {name: dataclasses.asdict(x) for name, x in agreements.items()},
            "human_judging": judging,
        },
        notes=notes,
        parts=[
            _table(agreements, options),
            *against_people(labelled, verdicts, options.examples),
        ],
    )


def _table(agreements: dict[str, Agreement], options: JudgingOptions) -> Table:
    counts = ("kappa", "ties", "judged", "no verdict")
    return Table(
        title="Agreement with people",
        header=["comparisons", "accuracy", options.interval_heading, *counts],
        rows=[
            [
                name,
                f"{x.accuracy:.3f}",
                f"{x.interval[0]:.3f} – {x.interval[1]:.3f}",
                f"{x.kappa:.3f}",
                *map(str, (x.ties, x.number, x.failures)),
            ]
            for name, x in agreements.items()
        ],
        note="Accuracy: fraction of the labelled winners that the judge picks, its ties counted as "
        "halves. Kappa: Cohen's, each comparison in both orders; 0 is chance.",
    )
