"""The machine that is measured on, processes that measure themselves, medians and tables."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.recorder import MARK


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and system."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory("MemTotal"),
        "gpu": gpu(),
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """`machine()` in a few words."""
    gib = facts["memory_bytes"] / 2**30
    accelerator = f", {facts['gpu']}" if facts["gpu"] else ""
    return f"{facts['cores']} cores of {facts['cpu']}, {gib:.0f} GiB{accelerator}"


def memory(kind: str) -> int:
    """Bytes of a line of /proc/meminfo, such as MemTotal or MemAvailable."""
    return int(_line("/proc/meminfo", kind).split()[0]) * 1024


def gpu(what: str = "name") -> str | None:
    """Name of the first NVIDIA GPU, or what else nvidia-smi knows of it: "driver_version"."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return names.strip().splitlines()[0] if names.strip() else None


def _line(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A process that has ended: what the system counted of it, and what it said."""

    seconds: float
    cpu_seconds: float
    recorded: dict[str, Any] | None
    """Its JSON line (`recorder.Recorder.finish`), if it printed one."""
    error: str | None
    """Its last words, if it failed."""


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    timeout: float | None = None,
) -> Finished:
    """Run a process to its end, or stop it after so many seconds."""
    start, before = time.time(), os.times()
    own = {"BENCHMARK_START": repr(start), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            list(command),
            env=os.environ | own | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        words = f"stopped after {timeout:.0f} seconds"
        return Finished(seconds=time.time() - start, cpu_seconds=0.0, recorded=None, error=words)
    seconds, after = time.time() - start, os.times()
    lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    return Finished(
        seconds=seconds,
        cpu_seconds=sum(after[2:4]) - sum(before[2:4]),
        recorded=json.loads(lines[-1].removeprefix(MARK)) if lines else None,
        error=_last_words(done) if done.returncode else None,
    )


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return f"exit {done.returncode}: " + (lines[-1] if lines else "said nothing")


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def round_ratio(own: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """The median over rounds of own / base, each ratio taken within its round."""
    ratios = [a / b for a, b in zip(own, base, strict=True) if a is not None and b is not None]
    return median(ratios) if ratios else None


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers to the right, None as an empty cell."""
    cells = [["" if x is None else str(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str], fill: Callable[[str, int], str] = str.rjust) -> str:
        padded = [row[0].ljust(widths[0]), *map(fill, row[1:], widths[1:])]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:])
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def figure(value: float | None, digits: int = 2) -> str | None:
    """A number for a table."""
    return None if value is None else f"{value:,.{digits}f}"


def write_json(file: Path | None, content: Mapping[str, Any]) -> None:
    """The whole measurement, for later; nothing where no file is named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")
