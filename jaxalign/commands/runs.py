"""`jaxalign runs [FOLDER]`: a table of the runs below a folder, the newest first."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import tyro

from jaxalign.flags import parse
from jaxalign.reporting import print_table, run_list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The runs below a folder, the newest first: how far each is, and how well it does."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder that holds runs, or a run."""
    json: bool = False
    """Print JSON instead of a table: a list with an object per run."""


def main(arguments: Sequence[str]) -> int:
    """Print the table, then one line for each folder that is not a whole run."""
    options = parse(Options, "runs", arguments)
    runs = run_list.list_runs(options.folder)
    if options.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=2))
        return 0
    header, rows = run_list.table([run for run in runs if run.stage])
    if rows:
        print_table(header, rows)
    else:
        print(f"{options.folder}: no runs")
    for run in runs:
        if run.fault:
            print(f"{options.folder / run.name}: {run.state}: {run.fault}")
    return 0
