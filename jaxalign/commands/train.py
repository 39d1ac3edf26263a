"""`jaxalign train EXPERIMENT`: run an experiment, a Python file or module with config()."""

import sys
from collections.abc import Sequence

import jax

from jaxalign.commands.experiment import parse
from jaxalign.commands.report import print_table
from jaxalign.reporting import comparison, feedback, online, read_run, representation
from jaxalign.reporting.report import skipped_updates
from jaxalign.runs.train import train
from jaxalign.sharding.processes import ending_together, start
from jaxalign.training.loop import Stopped


def main(arguments: Sequence[str]) -> int:
    """Parse, train, print the report's table."""
    config = parse(arguments)
    start()
    with ending_together("train"):
        try:
            folder = train(config)
        except Stopped as stopped:
            print(
                f"jaxalign train: {stopped}; run the same command again to resume", file=sys.stderr
            )
            return 143
        if jax.process_index() == 0:
            finished = read_run(folder)
            tables = [comparison([finished])]
            stages = feedback, online, representation
            tables += [x.table([finished]) for x in stages if x.has_stage(finished)]
            for header, rows in tables:
                if rows:
                    print_table(header, rows)
            for line in skipped_updates(finished):
                print(line)
            print(f"report: {folder / 'report' / 'report.md'}")
            print(f"page: {folder / 'report' / 'index.html'}")
    return 0
