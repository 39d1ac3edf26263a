"""The studies of a real chat model: preference losses, and the entanglement of their gradients.

Command:  python -m experiments.small --model FOLDER [--second GEMMA] [--workers 8] [--minutes 10]
Time:     of a model of 135 million parameters, ten minutes on an H100 with eight processes
Expect:   a file under runs/small/rows for every run; then `python -m experiments.offline.small` and
          `python -m experiments.gradient_entanglement.small` write tables and figures

Every run is a small file as it ends; the same command resumes. `--cells` names what to run, e.g.
`offline` or `gradient_entanglement/dpo`.
"""

import tyro

from experiments import cells
from experiments.gradient_entanglement import small as entanglement
from experiments.offline import small as offline
from experiments.short_runs import Options
from jaxalign.errors import UserError


def main(options: Options) -> int:
    """Run what is missing; the number of cells that are not done."""
    first, *others = offline.cells()
    watched = entanglement.cells(options.second)
    # the losses wait for the SFT model; what is watched does not
    order = [first, *others[:-1], *watched[:24], others[-1], *watched[24:]]
    return cells.run(order, options, "experiments.small")


if __name__ == "__main__":
    try:
        raise SystemExit(bool(main(tyro.cli(Options))))
    except UserError as error:
        raise SystemExit(f"small: {error}") from None
