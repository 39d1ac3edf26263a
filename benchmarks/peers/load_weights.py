"""A folder of weights loaded by one library, and every parameter read once."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recorder import MARK, peak_memory


def jaxalign() -> Callable[[str], Iterable[Any]]:
    """Parameters in float32, as JAX arrays."""
    import jax

    from jaxalign.models import load_pretrained

    jax.devices()
    return lambda folder: jax.tree.leaves(jax.block_until_ready(load_pretrained(folder).params))


def torch() -> Callable[[str], Iterable[Any]]:
    """The model class of transformers."""
    from torch import float32
    from transformers import AutoModelForCausalLM

    def load(folder: str) -> Iterable[Any]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=float32)
        return [parameter.detach() for parameter in model.parameters()]

    return load


def safetensors() -> Callable[[str], Iterable[Any]]:
    """The tensors of the files as NumPy arrays, in nobody's order."""
    from safetensors.numpy import load_file

    def load(folder: str) -> Iterable[Any]:
        files = sorted(Path(folder).glob("*.safetensors"))
        return [tensor for file in files for tensor in load_file(file).values()]

    return load


def main(way: str, folder: str) -> None:
    """Load, read, print."""
    import numpy as np

    load = {"jaxalign": jaxalign, "torch": torch, "safetensors": safetensors}[way]()
    before, start = peak_memory(), time.perf_counter()
    arrays = load(folder)
    total = sum(float(np.vdot(x, x)) for x in map(np.asarray, arrays))
    seconds = time.perf_counter() - start
    line = {
        "seconds": seconds,
        "before_bytes": before,
        "peak_bytes": peak_memory(),
        "squares": total,
    }
    print(MARK + json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
