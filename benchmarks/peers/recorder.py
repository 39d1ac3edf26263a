"""What every contestant records of itself; the standard library alone, as each has its packages."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

MARK = "BENCHMARK "
PACKAGES = [
    "jaxalign",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "transformers",
    "trl",
    "accelerate",
]
PACKAGES += ["google-tunix", "safetensors", "numpy"]


def peak_memory() -> int:
    """Bytes of the largest resident set this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: the benchmarks measure memory on Linux")


def fingerprint(rows: Iterable[Sequence[int]]) -> str:
    """A hash of rows of token ids, whatever their order."""
    ordered = sorted([int(token) for token in row] for row in rows)
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:16]


class Recorder:
    """Wall clock, CPU clock and peak memory at the end of each step; one JSON line at the end."""

    def __init__(self, device_peak: Callable[[], int] | None = None):
        self._device_peak = device_peak
        self._started = float(os.environ["BENCHMARK_START"])
        self._last = time.perf_counter(), time.process_time()
        self.result: dict = {"seconds": [], "cpu_seconds": [], "peak_bytes": [], "losses": []}

    def step(self, loss: float | None = None) -> None:
        """A step is finished: its loss is on the host."""
        now = time.perf_counter(), time.process_time()
        if not self.result["seconds"]:
            self.result["first_step"] = time.time() - self._started
        self.result["seconds"].append(now[0] - self._last[0])
        self.result["cpu_seconds"].append(now[1] - self._last[1])
        self.result["peak_bytes"].append(peak_memory())
        if self._device_peak is not None:
            self.result.setdefault("device_peak_bytes", []).append(self._device_peak())
        if loss is not None:
            self.result["losses"].append(loss)
        self._last = now

    def finish(self, **others) -> None:
        """Print what was recorded, the versions, and what else there is to say."""
        versions = {"python": sys.version.split()[0]}
        for package in PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        line = self.result | {"versions": versions} | others
        print(MARK + json.dumps(line), flush=True)
