"""The kept responses of the study before a larger model that can read, behind a server.

Command:  python -m experiments.ipo_md.small_read --judge MODEL.gguf [--rows ROWS]
Needs:    the rows of experiments.ipo_md.small, with responses; xllamacpp
Time:     ten minutes a method with a judge of 1.5 billion parameters on one CPU core
Expect:   a line of read.jsonl for every policy and seed; then `python -m
          experiments.ipo_md.small_tables` shows them

The judge sees each response beside the reference's to the same prompt, in both orders, with the
question that it answers best in experiments/judging. What it has read is not read again.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.ipo_md.small_options import read
from experiments.ipo_md.small_tables import LABELS, READ, Row, by_seed, of_methods
from experiments.served import served
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, make_annotator

FOLDER = Path(__file__).parent
TEMPLATE = FOLDER.parent / "judging" / "short_chat.txt"


def missing(rows: Path) -> list[tuple[str, int]]:
    """Policies and seeds that have responses and no verdicts yet, seed by seed."""
    known = {(row["policy"], row["seed"]) for row in read(rows / READ)}
    written = of_methods(rows, "responses")
    seeds = {
        name: {row["seed"] for row in own} for name, own in written.items() if name != "reference"
    }
    every = [(name, seed) for name, own in seeds.items() for seed in own]
    order = list(LABELS)
    todo = [one for one in every if one not in known]
    return sorted(todo, key=lambda one: (one[1], order.index(one[0])))


def check_judge(path: Path, judge: str) -> None:
    """Check that verdicts are of this judge.

    Raises:
      UserError: they are of another one.
    """
    for row in read(path):
        if row["judge"] != judge:
            raise UserError(f"{path}: has verdicts of {row['judge']}; move the file away first")


def main() -> None:
    """Judge what has not been judged."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--judge", required=True, help="GGUF file")
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    flags.add_argument("--template", type=Path, default=TEMPLATE, help="question to the judge")
    flags.add_argument("--threads", type=int, help="of the judge; default: one for every core")
    args = flags.parse_args()
    rows: Path = args.rows
    if not read(rows / "responses_reference.jsonl"):
        raise UserError(f"{rows}: has no responses; run experiments.ipo_md.small first")
    own_name = Path(args.judge).stem
    check_judge(rows / READ, own_name)
    prompts = [row["prompt"] for row in read(rows / "prompts.jsonl")]
    others = by_seed(read(rows / "responses_reference.jsonl"), "response")
    with served(args.judge, threads=args.threads) as name:
        options = AnnotatorOptions(template=args.template, workers=1, timeout=900.0)
        judge = make_annotator(name, options)
        for policy, seed in missing(rows):
            responses = by_seed(read(rows / f"responses_{policy}.jsonl"), "response")[seed]
            verdicts = judge.preferences(prompts, responses, others[seed])
            row: Row = {
                "judge": own_name,
                "policy": policy,
                "seed": seed,
                "preference": [
                    round(float(x), 4) if np.isfinite(x) else None for x in verdicts.preference
                ],
                "same_in_both_orders": verdicts.order_consistency,
            }
            with (rows / READ).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            mean = np.nanmean(verdicts.preference)
            print(f"{policy}, seed {seed}: {mean:.3f} over the reference", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"small_read: {error}") from None
