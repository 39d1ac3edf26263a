"""What the studies share: the folder of data, runs that are made once, and means over seeds."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxalign.config import TrainConfig
from jaxalign.reporting import read_run
from jaxalign.runs.train import train

DATA = Path(os.environ.get("JAXALIGN_SHARED", "../shared")) / "data"
TINY, PAPER = "runs/base_lm/export", "openai-community/gpt2"


def finished(config: TrainConfig) -> Path:
    """The folder of a run, which is made or gone on with where it is not complete."""
    folder = Path(config.output) / config.name
    if (folder / "report" / "report.md").is_file():
        return folder
    return train(config)


def seeds(config: TrainConfig, numbers: Sequence[int]) -> list[Path]:
    """One run per seed."""
    return [finished(replace(config, name=f"{config.name}_{seed}", seed=seed)) for seed in numbers]


def change(folder: Path, metric: str) -> float:
    """A held-out metric after the preference stage less before it."""
    values = read_run(folder).first_and_last("preference", metric)
    if values is None:
        raise ValueError(f"{folder}: no held-out {metric}")
    return values[1] - values[0]


def curve(folder: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric of the training batches."""
    return read_run(folder).curve("preference", "train", f"entanglement/{metric}")


def mean(folder: Path, metric: str) -> float:
    """The mean of a metric over the watched steps."""
    return float(np.mean(curve(folder, metric)[1]))


def spread(values: Sequence[float], form: str = "{:+.2f}") -> str:
    """Mean and standard deviation of a few numbers."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} ± {np.std(values, ddof=1):.2f}"
