"""The parts in the order of their importance, each with its cost, and the processes that run them.

The first is the device's check. A part in JAX is a function of `workloads`, a peer's a script of
`benchmarks/peers` in the interpreter that `--peer-python` names.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.dpo_step import TOLERANCE, same
from benchmarks.gpu.sizes import Size
from benchmarks.machine import median, run

PEERS = Path(__file__).parents[1] / "peers"
WEIGHTS = 60
"""Seconds, at 1B, to write the weights that the peers read."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that is measured."""

    name: str
    seconds: float
    """About how long it takes at 1B, from the start of its process to the end."""
    peer: Callable[[Size, Path], list[str]] | None = None
    """(size, scratch folder) -> script and arguments of a peer; None: `measured_here` runs it."""
    base: str | None = None
    """Of a peer: the part with which it is compared."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a part."""

    result: dict[str, Any] | None = None
    error: str | None = None


def trainer(script: str, **job: Any) -> Callable[[Size, Path], list[str]]:
    """Command of a peer that trains on the pairs of the scratch folder."""

    def command(size: Size, folder: Path) -> list[str]:
        output = folder / "peer"
        output.mkdir(exist_ok=True)
        common = {
            "model": str(folder / "model"),
            "pairs_file": str(folder / "pairs.jsonl"),
            "output": str(output),
            "length": size.length,
            "pairs": size.pairs,
            "dtype": "bfloat16",
            "steps": size.skip + size.steps,
            "learning_rate": 1e-6,
            "beta": 0.1,
        }
        return [str(PEERS / script), json.dumps(common | job)]

    return command


def transformers_sampling(size: Size, folder: Path) -> list[str]:
    """Command of `generate` of transformers, with as many rows as jaxalign's first."""
    from benchmarks.gpu.workloads import sampling_prompts

    job = {
        "model": str(folder / "model"),
        "prompts": sampling_prompts(size, size.sampled_rows[0]).tolist(),
        "new": size.new,
        "repeats": 2,
        "dtype": "bfloat16",
    }
    file = folder / "peer.json"
    file.write_text(json.dumps(job))
    return [str(PEERS / "generate.py"), "transformers", f"@{file}"]


CHECKS = "checks"
TRL = {"checkpointing": False, "precomputed": False}
PARTS = (
    Part(name="dpo", seconds=30),
    Part(name="watched", seconds=45),
    Part(name="sft", seconds=30),
    Part(name="packing", seconds=40),
    Part(name="shared prompts", seconds=40),
    Part(name="dpo, TRL", seconds=80, peer=trainer("trl_trainer.py", **TRL), base="dpo"),
    Part(name="sft, TRL", seconds=70, peer=trainer("trl_sft_trainer.py"), base="sft"),
    Part(
        name="dpo, PyTorch compiled",
        seconds=100,
        peer=trainer("torch_loop.py", way="response", compile=True),
        base="dpo",
    ),
    Part(name="attention", seconds=30),
    Part(name="gradients", seconds=20),
    Part(name="sampling", seconds=40),
    Part(
        name="sft, PyTorch compiled",
        seconds=80,
        peer=trainer("torch_loop.py", way="text", compile=True),
        base="sft",
    ),
    Part(name="sampling, transformers", seconds=60, peer=transformers_sampling, base="sampling"),
    Part(name="dpo, remat none", seconds=30),
    Part(name="dpo, remat full", seconds=20),
    Part(name="8B by LoRA", seconds=110),
)


def measured_here(name: str, size: Size) -> dict[str, Any]:
    """Run a part of jaxalign, or the checks, in this process."""
    from benchmarks.gpu import checks, kernels, workloads

    if name == CHECKS:
        found = [vars(one) for one in checks.check_device()]
        return {"device": workloads.device_facts(), "checks": found}
    functions: dict[str, Callable[[Size], dict[str, Any]]] = {
        "dpo": workloads.dpo,
        "watched": workloads.watched,
        "attention": kernels.attention_kernels,
        "gradients": kernels.gradient_kernels,
        "sft": workloads.sft,
        "sampling": workloads.sampling,
        "shared prompts": workloads.shared_prompts,
        "packing": workloads.packed_pairs,
        "dpo, remat none": lambda size: workloads.dpo_with_remat("none", size),
        "dpo, remat full": lambda size: workloads.dpo_with_remat("full", size),
        "8B by LoRA": workloads.large_lora,
    }
    return functions[name](size)


def measured_in_process(name: str, size: str, folder: Path, timeout: float) -> Outcome:
    """Run a part of jaxalign, or the checks, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--size", size]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "compiled")}
    done = run(command, ENVIRONMENT | cache, timeout=timeout)
    if done.error or done.recorded is None:
        return Outcome(error=done.error or "printed no result")
    return Outcome(result=done.recorded)


def write_peer_inputs(size: Size, folder: Path) -> None:
    """Weights and pairs for the peers, unless they are there."""
    if not (folder / "pairs.jsonl").exists():
        prompt = (size.length - size.response) / size.length
        inputs.make(folder, size=size.model, length=size.length, pairs=size.pairs, prompt=prompt)


def measured_by_peer(
    part: Part, python: str, size: Size, folder: Path, timeout: float, base: Mapping[str, Any]
) -> Outcome:
    """Run a peer, and compare what it computed with jaxalign's part.

    Args:
      part: with a `peer`.
      python: interpreter that has its packages.
      size: of model and batch.
      folder: where weights and pairs are written once.
      timeout: seconds after which it is stopped.
      base: row of jaxalign's part; empty: it was not measured.
    """
    assert part.peer is not None
    try:
        write_peer_inputs(size, folder)
    except subprocess.CalledProcessError as error:
        return Outcome(error=f"its weights could not be written: exit {error.returncode}")
    done = run([python, *part.peer(size, folder)], ENVIRONMENT, timeout=timeout)
    if done.error or done.recorded is None:
        return Outcome(error=done.error or "printed no result")
    way, recorded = part.name.partition(", ")[2], done.recorded
    skip = size.skip if "losses" in recorded else 0
    seconds = median(recorded["seconds"][skip:])
    tokens = 2 * size.pairs * size.length
    row = {"seconds": seconds, "all_seconds": recorded["seconds"][skip:]}
    if "losses" in recorded:
        known = base.get("mfu"), base.get("seconds")
        row |= {
            "mfu": known[0] * known[1] / seconds if known[0] and known[1] else None,
            "losses": recorded["losses"],
            "note": agreement(recorded, base) if base else None,
        }
    else:
        tokens = size.sampled_rows[0] * size.new
    peaks = recorded.get("device_peak_bytes")
    row |= {
        "tokens_per_second": tokens / seconds,
        "peak_bytes": (max(peaks) if isinstance(peaks, list) else peaks) or None,
        "ratio": seconds / base["seconds"] if base.get("seconds") else None,
        "versions": recorded.get("versions"),
    }
    return Outcome(result={way: row})


def agreement(recorded: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Whether a peer computed what jaxalign did; if not, what differs."""
    if base["log_probs"]:
        return same(recorded, [base], "bfloat16")
    if recorded["tokens"] != base["tokens"]:
        return "NO: other tokens"
    apart = abs(recorded["losses"][0] / base["losses"][0] - 1)
    return "same" if apart <= TOLERANCE["bfloat16"][0] else f"NO: loss {apart:.0e}"


def estimate(part: Part, size: str, folder: Path) -> float:
    """Seconds that a part will take."""
    if size != "1B":
        return 1.0
    missing = part.peer is not None and not (folder / "pairs.jsonl").exists()
    return part.seconds + WEIGHTS * missing
