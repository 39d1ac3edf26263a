"""A run folder: config, versions, metrics, checkpoints and report of a new or resumed run."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxalign.config import TrainConfig, read_config, to_json
from jaxalign.errors import UserError
from jaxalign.files import check_output, locked, remove, write_json, write_text
from jaxalign.reporting.runs import STEPS
from jaxalign.runs.inputs import check_inputs, input_digests, keep_inputs
from jaxalign.sharding.processes import in_turn
from jaxalign.stages.inputs import INPUTS
from jaxalign.training.checkpoints import DAMAGED
from jaxalign.training.metrics import parse_metrics

PACKAGES = (
    "jaxalign",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
)
MAY_CHANGE = ("mesh", "output", "export", "wandb_project", "damaged_checkpoints", "streaming")
"""Fields that a resumed run may change: they do not affect its results."""
MADE = (
    "config.json",
    INPUTS,
    "environment.json",
    "data.json",
    "model.json",
    "remat.json",
    "packing.json",
    STEPS,
    "generation_config.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "ledger.jsonl",
    "reference_log_probs.npz",
    "tokenizer",
    "tokens",
    "checkpoints",
    "tensorboard",
    "profile",
)
"""What a run that fails before its first step may leave and a new run replaces; a judge's answers
are kept."""


@contextlib.contextmanager
def run_folder(config: TrainConfig) -> Iterator[Path]:
    """The folder output/name, new or of an earlier run of the same config; locked for this command.

    The files of a run that failed before its first step are replaced.

    Raises:
      UserError: the folder cannot be written, another command is writing it, or it has a run of
        another config or with other inputs.
    """
    folder = Path(config.output) / _checked_name(config.name)
    with contextlib.ExitStack() as stack:
        with in_turn("run folder"):
            if jax.process_index() == 0:
                check_output(folder, "--output", folder=True)
                stack.enter_context(locked(folder, "--name", folder=True))
                _open(config, folder)
            elif not (folder / "config.json").exists():
                raise UserError(
                    f"{folder}: is not the folder of process 0; set --output to a folder that all "
                    "processes share"
                )
        yield folder


def _checked_name(name: str) -> str:
    """A run's name, checked to be a path below the output folder."""
    parts = Path(name).parts
    fault = None
    if "\0" in name:
        fault = "has a NUL character"
    elif not parts:
        fault = "names no folder"
    elif Path(name).is_absolute() or ".." in parts:
        fault = "leaves the output folder"
    elif max(len(os.fsencode(part)) for part in parts) > 255:
        fault = "has more than 255 bytes"
    if fault is not None:
        raise UserError(f"name: {name[:80]!r} {fault}; set --name to a plain name")
    return name


def _open(config: TrainConfig, folder: Path) -> None:
    """Check an existing run in the folder, or start a new one."""
    path, inputs = folder / "config.json", input_digests(config)
    if path.exists():
        before = read_config(path)
        changed = [
            name
            for name in vars(config)
            if name not in MAY_CHANGE and getattr(before, name) != getattr(config, name)
        ]
        faults = check_inputs(folder, inputs)
        if not changed and not faults:
            keep_inputs(folder, inputs)
            return
        if _has_progress(folder):
            if changed:
                raise UserError(
                    f"{folder}: holds a run with different {', '.join(changed)}; "
                    "set --name to start another run, or remove the folder"
                )
            raise UserError(f"{faults[0]}; restore it, or set --name to start another run")
        for name in MADE:
            remove(folder / name)
    elif _has_progress(folder):
        raise UserError(f"{path}: missing, but there are checkpoints or metrics; restore it")
    write_json(folder / "environment.json", _environment())
    keep_inputs(folder, inputs)
    write_text(path, to_json(config) + "\n")


def _has_progress(folder: Path) -> bool:
    """Whether a run has made its first step."""
    saved = (folder / "checkpoints").glob("*/*")
    if any(one.name.isdigit() or one.name.startswith(DAMAGED) for one in saved):
        return True
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return False
    lines, faults = parse_metrics(metrics)
    return bool(faults) or any(line["step"] > 0 for line in lines)


def _environment() -> dict[str, Any]:
    """Versions, devices and git revision, to reproduce the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_revision": revision,
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
    }
