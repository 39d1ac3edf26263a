"""The effect of alpha and of the layers: fits from one instruction-tuned model.

Command:  python -m experiments.rahf.sweep [--run runs/rahf_scit] [--steps 120]
Time:     under a minute for each fit on two CPU cores
Needs:    base and scit of this folder
"""

import argparse
import dataclasses
from pathlib import Path

from experiments.page import put, table
from experiments.rahf.compare import FOLDER, shortened
from experiments.rahf.looking import tuned_model
from jaxalign.config import PreferenceConfig, with_fields
from jaxalign.reporting import read_run
from jaxalign.runs.train import train
from jaxalign.stages.models import read_run_config
from jaxalign.stages.representation import make_reader

ALPHAS = (0.0, 1.0, 5.0, 10.0)
SHOWN = {
    "pattern/projection": 2,
    "pattern/drift": 3,
    "kl": 4,
    "rewards/accuracies": 3,
    "rewards/margins": 3,
    "logps/chosen": 1,
    "logps/rejected": 1,
}


def main() -> None:
    """Fit, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--run", type=Path, default=Path("runs/rahf_scit"))
    flags.add_argument("--steps", type=int, help="of each fit; default: those of the config")
    given = flags.parse_args()
    depth = tuned_model(given.run).config.layers
    config = shortened(read_run_config(given.run), given.steps, 0)
    config = dataclasses.replace(
        config, model=str(given.run / "tuned"), preference=PreferenceConfig()
    )
    middle = make_reader(config, tuned_model(given.run).config).layers
    bands = {middle: ALPHAS, (middle[0] - 1 or 1,): (5.0,), (depth - 1, depth): (5.0,)}
    rows = []
    for layers, alphas in bands.items():
        for alpha in alphas:
            names = "_".join(map(str, layers))
            name = f"{config.name}_layers_{names}_alpha_{alpha:g}"
            point = {"alignment.layers": layers, "alignment.alpha": alpha}
            folder = train(with_fields(config, name=name, export=False, **point))
            last = read_run(folder)
            values = [last.first_and_last("representation", key) for key in SHOWN]
            cells = [
                f"{value[1]:.{digits}f}" if value else ""
                for value, digits in zip(values, SHOWN.values(), strict=True)
            ]
            rows.append([f"{', '.join(map(str, layers))}; {alpha:g}", *cells])
    header = ["layers; alpha", "moved along v", "norm of the move", "KL (nats/token)", "accuracy",
              "margin (nats)", "chosen log-prob", "rejected log-prob"]  # fmt: skip
    text = table(header, rows)
    print(text)
    steps = f" --steps {given.steps}" if given.steps else ""
    put(FOLDER, "sweep", f"`python -m experiments.rahf.sweep{steps}` printed:\n\n{text}")


if __name__ == "__main__":
    main()
