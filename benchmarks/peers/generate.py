"""Greedy generation by one library: the same prompts again and again, each time on the clock."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recorder import MARK, peak_memory

Generate = Callable[[], Any]
"""Runs to the end; the new tokens, [rows, new]."""


def jaxalign(folder: str, prompts: Sequence[Sequence[int]], new: int, dtype: str) -> Generate:
    """`jaxalign.generation`, prompts of a batch as they are, nothing ends a row early."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxalign.generation import Sampling, compile_generate
    from jaxalign.models import load_pretrained
    from jaxalign.sharding import make_mesh

    model, mesh = load_pretrained(folder), make_mesh()
    run = compile_generate(
        model.config,
        mesh,
        sampling=Sampling(max_tokens=new, temperature=0.0),
        samples=1,
        dtype=jnp.dtype(dtype),
    )
    tokens = jnp.asarray(prompts, jnp.int32)
    lengths = jnp.full(len(prompts), tokens.shape[1], jnp.int32)
    inputs = [model.params], tokens, lengths, jax.random.key(0), jnp.ones(1), 0
    return lambda: np.asarray(run(*inputs).tokens)


def transformers(folder: str, prompts: Sequence[Sequence[int]], new: int, dtype: str) -> Generate:
    """`generate` of the model class, with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokens = torch.tensor(prompts, device=device)
    model.to(device)
    exact = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

    def run() -> Any:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **exact)
        return out[:, tokens.shape[1] :].cpu().numpy()

    return run


def device_peak() -> int:
    """Bytes of PyTorch's largest use of a GPU; 0 where there is none."""
    torch = sys.modules.get("torch")
    return 0 if torch is None else torch.cuda.max_memory_allocated()


def main(way: str, job: str) -> None:
    """Warm up, measure, print; a job of "@FILE" is read from the file."""
    text = Path(job[1:]).read_text() if job.startswith("@") else job
    given = json.loads(text)
    make = {"jaxalign": jaxalign, "transformers": transformers}[way]
    run = make(given["model"], given["prompts"], given["new"], given.get("dtype", "float32"))
    out = run()
    seconds, cpu_seconds = [], []
    for _ in range(given["repeats"]):
        start, before = time.perf_counter(), os.times()
        run()
        after = os.times()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(after.user + after.system - before.user - before.system)
    line = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak_memory(),
        "device_peak_bytes": device_peak(),
        "tokens": out.tolist(),
    }
    print(MARK + json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
