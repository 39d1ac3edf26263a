"""A virtual environment for each family of peers, made by pip from the package index once."""

import subprocess
import sys
from pathlib import Path

from benchmarks import machine

REQUIREMENTS = {
    "torch": ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0"],
    "tunix": ["google-tunix==0.1.7"],
    "llama": ["xllamacpp==2026.10.11549"],
}
ON_GPU = {"torch": [], "tunix": ["jax[cuda13]"], "llama": []}
DEFAULT = Path(__file__).parent / ".environments"


def python_of(name: str, folder: Path) -> str:
    """The interpreter of an environment, which is made if it is not there as it should be."""
    environment = folder.resolve() / f".venv-peers-{name}"
    python, written = environment / "bin" / "python", environment / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS[name] + (ON_GPU[name] if machine.gpu() else [])) + "\n"
    if not (written.exists() and written.read_text() == wanted):
        print(f"pip install into {environment}: {wanted.split()}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted.split()], check=True)
        written.write_text(wanted)
    return str(python)
