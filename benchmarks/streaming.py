"""Reading pairs with records and tokens in memory, and with both on disk: memory and seconds.

Command:  python -m benchmarks.streaming [--megabytes 200] [--rounds 1] [--json FILE]
Time:     some minutes on two CPU cores, most of them spent tokenising
Expect:   one table; on disk the memory hardly grows with the file, and the second start reads
          neither the file's records nor its tokens

The file has pairs of random words, and the tokenizer is the embedded one or that of `--tokenizer`.
Each way is a process of its own: "memory" (`--streaming never`), "disk, first" (indexes and
tokenises, with worker processes) and "disk, again" (as a resumed run). All read the same data as a
stage would, up to the first batch, then 100 batches from the middle of an epoch; the batches must
be the same. "private" is the peak of the memory that belongs to the process alone; pages of mapped
files, which the system takes back when memory is short, are only in "resident". "worker" is the
largest resident memory of a worker process.
"""

import hashlib
import json
import resource
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks.machine import describe, figure, machine, median, run, table, write_json
from benchmarks.peers.recorder import MARK, peak_memory

WAYS = {"memory": "never", "disk, first": "always", "disk, again": "always"}
BATCHES = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    megabytes: int = 200
    """Size of the file."""
    words: int = 150
    """Mean number of words of a prompt and of a response."""
    max_length: int = 1024
    """Largest number of tokens of a row."""
    tokenizer: str | None = None
    """Folder of a tokenizer; None: the embedded one."""
    rounds: int = 1
    """How often each way runs."""
    json: Path | None = None
    """Where to write all that was measured."""
    way: Literal["never", "always"] | None = None
    """Measure this way in this process; None: all, each in a process of its own."""
    folder: Path | None = None
    """Of the file of pairs and of the cache, with `way`."""


def main(options: Options) -> None:
    """Measure and print."""
    facts = machine()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="streaming_") as scratch:
            pairs = write(Path(scratch) / "pairs.jsonl", options)
            for way, mode in WAYS.items():
                command = [sys.executable, "-m", "benchmarks.streaming", "--way", mode]
                command += ["--folder", scratch, "--max-length", str(options.max_length)]
                command += ["--tokenizer", options.tokenizer] if options.tokenizer else []
                done = run(command, {"JAX_PLATFORMS": "cpu"})
                if done.error or done.recorded is None:
                    sys.exit(f"{way}: {done.error}")
                runs[way].append(done.recorded | {"cpu_seconds": done.cpu_seconds})
    digests = {result["digest"] for results in runs.values() for result in results}
    assert len(digests) == 1, "the batches differ"
    tokens = runs["memory"][0]["tokens"]
    print(f"{options.megabytes} MB, {pairs:,} pairs, {tokens:,} tokens; {describe(facts)}")
    names = ["first_batch", "batches", "cpu_seconds", "private", "resident", "worker"]
    rows = []
    for way, results in runs.items():
        values = [median([result[name] for result in results]) for name in names]
        digits = [1, 2, 1]
        seconds = [figure(x, digit) for x, digit in zip(values[:3], digits, strict=True)]
        rows.append([way, *seconds, *(figure(x / 1e6, 0) for x in values[3:])])
    header = ["way", "s to first batch", f"s for {BATCHES} more", "CPU-seconds"]
    print(table([*header, "private MB", "resident MB", "worker MB"], rows))
    content = {"machine": facts, "options": asdict(options) | {"json": None}, "runs": runs}
    write_json(options.json, content)


def write(path: Path, options: Options) -> int:
    """Write pairs of random words; returns their number."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, 5000)])

    def text() -> str:
        return " ".join(words[rng.integers(0, len(words), rng.poisson(options.words))])

    number, size = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < options.megabytes * 1e6:
            row = {"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"}
            size += file.write(json.dumps(row) + "\n")
            number += 1
    return number


def measure(options: Options) -> None:
    """Read the data of a preference stage, and print what that took."""
    from jaxalign.config import PreferenceConfig, TrainConfig
    from jaxalign.data import embedded_tokenizer, load_tokenizer
    from jaxalign.models import DecoderConfig
    from jaxalign.stages import kind_of
    from jaxalign.stages.inputs import Inputs

    assert options.folder is not None
    assert options.way is not None
    config = TrainConfig(
        data=str(options.folder / "pairs.jsonl"),
        output=str(options.folder / "runs"),
        max_length=options.max_length,
        streaming=options.way,
        preference=PreferenceConfig(steps=1, batch_size=16),
    )
    shape = DecoderConfig(
        vocab_size=2**18, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8,
        context_length=options.max_length,
    )  # fmt: skip
    name = options.tokenizer
    tokenizer = embedded_tokenizer() if name is None else load_tokenizer(name)
    tokenizer("loaded")
    start, peak = time.perf_counter(), _Peak()
    with peak:
        inputs = Inputs(config, tokenizer, options.folder, shape, (0, 1))
        data: Any = kind_of(config, "preference").load(config, inputs)
        batches = data.batches(16, seed=0)
        digest = _add(hashlib.sha256(), next(batches))
        first = time.perf_counter() - start
        start = time.perf_counter()
        batches.set_state({**batches.get_state(), "next_index": len(data.train) // 32})
        for _ in range(BATCHES):
            _add(digest, next(batches))
    result = {
        "first_batch": first,
        "batches": time.perf_counter() - start,
        "private": peak.bytes,
        "resident": peak_memory(),
        "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "tokens": inputs.report["train_pairs"]["tokens"],
        "digest": digest.hexdigest(),
    }
    print(MARK + json.dumps(result))


def _add(digest: Any, batch: Any) -> Any:
    for name in ("tokens", "prompt_length", "response_tokens", "record_index"):
        digest.update(getattr(batch, name).tobytes())
    return digest


class _Peak:
    """Context that samples the process's private memory."""

    def __init__(self):
        self.bytes, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._end.wait(0.02):
            self.bytes = max(self.bytes, private_memory())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, private_memory())


def private_memory() -> int:
    """Bytes of this process's resident memory that are not of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: memory is measured on Linux")


if __name__ == "__main__":
    chosen = tyro.cli(Annotated[Options, tyro.conf.arg(name="")])
    measure(chosen) if chosen.way else main(chosen)
