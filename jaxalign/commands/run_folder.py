"""A run folder: config, versions, metrics, checkpoints, report; made anew or gone on with."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from jaxalign.config import TrainConfig, from_json, to_json
from jaxalign.errors import UserError
from jaxalign.sharding.processes import in_turn

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
MAY_CHANGE = ("mesh", "output", "export", "wandb_project")
"""Fields that a run may be gone on with in another form: they do not change what it computes."""


def open_run_folder(config: TrainConfig) -> Path:
    """The folder output/name, made now or left by the same config.

    Raises:
      UserError: the folder holds a run of another config.
    """
    with in_turn("run folder"):
        return _open(config, Path(config.output) / config.name)


def _open(config: TrainConfig, folder: Path) -> Path:
    import jax

    written = folder / "config.json"
    if not written.exists() and jax.process_index() != 0:
        raise UserError(
            f"{folder}: is not the folder that process 0 made; set --output to one that all "
            "processes share"
        )
    if written.exists():
        before = from_json(written.read_text(encoding="utf-8"))
        changed = [
            name
            for name in vars(config)
            if name not in MAY_CHANGE and getattr(before, name) != getattr(config, name)
        ]
        if changed:
            raise UserError(
                f"{folder}: holds a run whose {', '.join(changed)} differ; "
                "set --name to start another, or remove the folder"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(_environment(), indent=2) + "\n")
    scratch = folder / "config.partial"
    scratch.write_text(to_json(config) + "\n", encoding="utf-8")
    scratch.replace(written)
    return folder


def _environment() -> dict:
    """Versions, devices and git revision: what a reader needs to run it again."""
    import jax

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
