"""Answers after each loss beside the SFT model's, judged by a larger model behind a server.

Command:  python -m experiments.offline.judged --judge MODEL.gguf [--rows ROWS]
Needs:    the rows of experiments.offline.small, with answers; xllamacpp
Time:     a loss takes about five minutes with a judge of 1.5 billion parameters on one CPU core
Expect:   a row judged_LOSS for every loss; then `python -m experiments.offline.small` shows them

How far the judge agrees with people is measured in experiments/judging. It sees each pair of
answers in both orders.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from experiments.offline.small import FOLDER, LOSSES
from experiments.rows import Rows
from experiments.served import served
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, make_annotator

TEMPLATE = FOLDER.parent / "judging" / "short_chat.txt"
"""The question that the judge answers best."""


def main() -> None:
    """Judge the losses that have answers and no verdicts yet."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--judge", required=True, help="GGUF file")
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    flags.add_argument("--template", type=Path, default=TEMPLATE, help="question to the judge")
    given = flags.parse_args()
    rows = Rows(folder=given.rows)
    if "answers_sft" not in rows:
        raise UserError(f"{given.rows}: has no answers of the SFT model; run offline/answers_sft")
    before = rows["answers_sft"]["answers"]
    with served(given.judge) as name:
        options = AnnotatorOptions(template=given.template, workers=1, timeout=900.0)
        judge = make_annotator(name, options)
        for loss in LOSSES:
            if f"answers_{loss}" not in rows or f"judged_{loss}" in rows:
                continue
            began, after = time.perf_counter(), rows[f"answers_{loss}"]["answers"]
            verdicts = judge.preferences(
                [one["question"] for one in after],
                [one["answer"] for one in after],
                [one["answer"] for one in before],
            )
            preference = verdicts.preference
            row = {
                "judge": Path(given.judge).stem,
                "preference": [float(x) if np.isfinite(x) else None for x in preference],
                "same_in_both_orders": verdicts.order_consistency,
                "seconds": time.perf_counter() - began,
            }
            rows.write(f"judged_{loss}", row)
            print(f"{loss}: {np.nanmean(preference):.3f} over the SFT model", flush=True)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"the judge took {(spent.ru_utime + spent.ru_stime) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"judged: {error}") from None
