"""What the allocator of memory costs a training step on a CPU.

Command:  python -m benchmarks.allocator --model FOLDER --data pairs.jsonl
Time:     about ten minutes for a model of 135 million parameters on one CPU core
Expect:   fewer page faults with huge pages, none with tcmalloc, and less time in the system

Every execution of a compiled step asks the C library for its temporary memory and gives it back.
glibc takes blocks of this size from the system and returns them at once, so each step touches new
pages, which the system first fills with zeros. The environment can change that: huge pages, 512
times fewer of them (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, glibc 2.35, where the system's
setting is `madvise` or `always`), or an allocator that keeps memory (tcmalloc, where it is
installed). Each line is a process of its own, in turn, round by round: SFT of all parameters.
"""

import ctypes.util
import json
import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from benchmarks.machine import describe, figure, machine, median, round_ratio, run, table
from benchmarks.peers.recorder import MARK
from jaxalign.data import (
    TokenizedResponses,
    load_tokenizer,
    preference_records,
    tokenize_responses,
)
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.models import load_pretrained
from jaxalign.representation import responses_of
from jaxalign.training.objectives import Policy, SupervisedObjective
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.step import initial_state, train_step

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model: str
    """Folder of the model and its tokenizer."""
    data: str
    """File of preference pairs; their chosen responses are imitated."""
    max_length: int = 256
    """Longest prompt plus response in tokens."""
    batch_size: int = 16
    """Responses in a batch."""
    steps: int = 5
    """Updates on one batch that are measured, after one that is not."""
    rounds: int = 2
    """Processes of each kind."""
    child: bool = False
    """Measure this process alone; set by the command itself."""


def main(options: Options) -> None:
    """Measure and print."""
    if options.child:
        return steps_of(options)
    environments = {
        "as it is": {},
        "glibc with huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    }
    if library := ctypes.util.find_library("tcmalloc_minimal"):
        environments["tcmalloc"] = {"LD_PRELOAD": library, "TCMALLOC_RELEASE_RATE": "0"}
    sizes = ("model", "data", "max_length", "batch_size", "steps")
    flags = [x for name in sizes for x in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, "-m", "benchmarks.allocator", *flags, "--child"]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in environments}
    for _ in range(options.rounds):
        for name, environment in environments.items():
            done = run(command, environment)
            if done.error or done.recorded is None:
                sys.exit(f"{name}: {done.error}")
            measured[name].append(done.recorded)
    first = [one["cpu"] for one in measured["as it is"]]
    rows = []
    for name, own in measured.items():
        names = ("seconds", "cpu", "system", "faults", "peak_gb")
        each = {key: median([one[key] for one in own]) for key in names}
        ratio = round_ratio([one["cpu"] for one in own], first)
        digits = [figure(each[x]) for x in ("seconds", "cpu", "system")]
        faults, peak = f"{each['faults']:,.0f}", figure(each["peak_gb"])
        rows.append([name, *digits, figure(ratio), faults, peak])
    print(f"{options.model}, SFT of {options.batch_size} responses, {options.steps} steps")
    pages = HUGE.read_text().strip() if HUGE.is_file() else "not known"
    print(f"{describe(machine())}, huge pages: {pages}")
    header = ["a step", "seconds", "CPU-seconds", "of these in the system"]
    print(table([*header, "own / as it is", "page faults", "peak GB"], rows))
    return None


def steps_of(options: Options) -> None:
    """Train a few steps on one batch and print what one took."""
    records = responses_of(list(preference_records(options.data)), "chosen")
    tokenizer, model = load_tokenizer(options.model), load_pretrained(options.model)
    rows, _ = tokenize_responses(records, tokenizer, max_length=options.max_length)
    examples = TokenizedResponses(rows=rows)
    batch = next(packed_batches(examples, Packing(), batch_size=options.batch_size, seed=0))
    policy = Policy(config=model.config, remat="dots")
    optimizer = make_optimizer("adamw", 2e-5)
    objective: Any = SupervisedObjective(policy=policy)
    step = jax.jit(
        partial(train_step, objective=objective, optimizer=optimizer), donate_argnames="state"
    )
    frozen = {"policy": None, "reference": None}
    state = initial_state(model.params, optimizer, seed=0)
    measured = []
    for _ in range(options.steps + 1):
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        state, _ = jax.block_until_ready(step(state, frozen, batch))
        after = resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        measured.append(
            {
                "seconds": time.perf_counter() - began,
                "cpu": after.ru_utime - before.ru_utime + system,
                "system": system,
                "faults": after.ru_minflt - before.ru_minflt,
            }
        )
    row = {name: median([one[name] for one in measured[1:]]) for name in measured[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(MARK + json.dumps(row | {"peak_gb": peak}))


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")], description=__doc__))
