"""Means of the rule: `python -m experiments.data_collection.compare NAME=FILE ...`."""

import sys

import numpy as np

from experiments.data_collection.glad import share
from jaxalign.commands.outputs import read_outputs
from jaxalign.commands.report import print_table


def main(*entries: str) -> None:
    """Print glad words in a hundred, and how many of an answer's words are different."""
    rows = []
    for entry in entries:
        name, _, file = entry.partition("=")
        outputs = read_outputs(file)
        found = [share(row.prompt, row.response) for row in outputs]
        different = [
            len(set(row.response.split())) / max(len(row.response.split()), 1) for row in outputs
        ]
        error = 1.96 * float(np.std(found)) / len(found) ** 0.5
        rows.append([name, f"{np.mean(found):.2f} ± {error:.2f}", f"{np.mean(different):.3f}"])
    print_table(["policy", "glad words in 100", "different words"], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
