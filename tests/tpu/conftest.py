"""Scripts run in an environment of their own, with recording stand-ins for the cloud's programs."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = """#!/usr/bin/env bash
{ printf '%s\\x1f' "${0##*/}" "$@"; echo; } >>"$RECORD"
case " $* " in
  *" describe "* | *"show --property=SubState"* | *" --format=%T "*)
    answer=$(head -n 1 "$ANSWERS")
    sed -i 1d "$ANSWERS"
    [[ -n $answer && $answer != no ]] || exit 1
    echo "$answer"
    ;;
esac
if [[ ${0##*/} == srun ]]; then exit "${SRUN_STATUS:-0}"; fi
"""
FAKES = ("gcloud", "git", "xpk", "kubectl", "srun", "squeue", "scontrol", "sudo", "systemctl")


class Cloud:
    """Runs scripts where every program of the cloud is a stand-in that records its words."""

    def __init__(self, folder: Path):
        self.folder = folder
        programs = folder / "programs"
        for name in FAKES:
            self.add(programs / name)
        self.answers = folder / "answers"
        self.record = folder / "record"
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "RECORD": str(self.record),
            "ANSWERS": str(self.answers),
        }

    def add(self, program: Path, text: str = FAKE) -> None:
        """Put a stand-in where a program would be."""
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)

    def run(self, line: str, *, answers: str = "", **settings: str) -> subprocess.CompletedProcess:
        """Run a line of the shell from the repository's root."""
        self.answers.write_text("\n".join(answers.split()) + "\n")
        self.record.write_text("")
        return subprocess.run(
            shlex.split(line),
            cwd=ROOT,
            env=self.environment | settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def recorded(self) -> list[list[str]]:
        """The commands that were run, as words; the question to git about changes left out."""
        lines = self.record.read_text().splitlines()
        commands = [line.split("\x1f")[:-1] for line in lines]
        return [command for command in commands if "--porcelain" not in command]

    def printed(self, line: str, **settings: str) -> list[list[str]]:
        """The commands that a dry run prints; it has to run none."""
        done = self.run(line, **settings)
        assert done.returncode == 0, done.stderr
        assert self.record.read_text() == ""
        return [shlex.split(command) for command in done.stdout.splitlines()]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)
