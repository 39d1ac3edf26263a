"""What one waits for before anything happens: imports and the command line's help.

Command:  python -m benchmarks.start_up [--rounds 5] [--json FILE]
Time:     about two minutes on two CPU cores; before the first, some minutes in which pip fetches
          the peers (nothing else uses the network)
Expect:   one table; `import jaxalign` and `--help` take less than `import trl`

Each line is a process of its own, in turn, round by round, after one round that leaves compiled
Python files and the disk's cache behind. Wall and CPU seconds of the whole process, medians. TRL
imports lazily: `import trl` alone is next to nothing of it, so its trainer's import is listed, too,
beside that of our train command.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import environments
from benchmarks.machine import describe, figure, machine, median, run, table, write_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    rounds: int = 5
    """How often each command runs, after once to warm up."""
    environments: Path = environments.DEFAULT
    """Where the peers' virtual environments are kept."""
    json: Path | None = None
    """Where to write all that was measured."""


def main(options: Options) -> None:
    """Measure and print."""
    torch = environments.python_of("torch", options.environments)
    ours = [sys.executable, "-m", "jaxalign.cli"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import jaxalign": [sys.executable, "-c", "import jaxalign"],
        "jaxalign --help": [*ours, "--help"],
        "jaxalign losses": [*ours, "losses"],
        "import jaxalign.commands.train": [sys.executable, "-c", "import jaxalign.commands.train"],
        "import trl": [torch, "-c", "import trl"],
        "trl --help": [str(Path(torch).parent / "trl"), "--help"],
        "from trl import DPOTrainer": [torch, "-c", "from trl import DPOTrainer"],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(options.rounds + 1):
        for name, command in commands.items():
            done = run(command)
            if done.error:
                sys.exit(f"{name}: {done.error}")
            if number:
                runs[name].append({"seconds": done.seconds, "cpu_seconds": done.cpu_seconds})
    facts = machine()
    print(describe(facts))
    rows = [
        [name, *(figure(median([x[key] for x in own])) for key in ("seconds", "cpu_seconds"))]
        for name, own in runs.items()
    ]
    print(table(["command", "seconds", "CPU-seconds"], rows))
    write_json(
        options.json,
        {
            "machine": facts,
            "options": asdict(options) | {"environments": None, "json": None},
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
