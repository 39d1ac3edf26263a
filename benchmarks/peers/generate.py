"""Greedy generation by one library: the same prompts again and again, each time on the clock."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from recorder import MARK, peak_memory

Generate = Callable[[], Any]
"""Runs to the end; the new tokens, [rows, new]."""


def jaxalign(folder: str, prompts: Sequence[Sequence[int]], new: int) -> Generate:
    """`jaxalign.generation`, prompts of a batch as they are, nothing ends a row early."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxalign.generation import Sampling, compile_generate
    from jaxalign.models import load_pretrained
    from jaxalign.sharding import make_mesh

    model, mesh = load_pretrained(folder), make_mesh()
    run = compile_generate(
        model.config, mesh, sampling=Sampling(max_tokens=new, temperature=0.0), samples=1
    )
    tokens = jnp.asarray(prompts, jnp.int32)
    lengths = jnp.full(len(prompts), tokens.shape[1], jnp.int32)
    inputs = [model.params], tokens, lengths, jax.random.key(0), jnp.ones(1), 0
    return lambda: np.asarray(run(*inputs).tokens)


def transformers(folder: str, prompts: Sequence[Sequence[int]], new: int) -> Generate:
    """`generate` of the model class, with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(prompts)
    exact = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}

    def run() -> Any:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **exact)
        return out[:, tokens.shape[1] :].numpy()

    return run


def main(way: str, job: str) -> None:
    """Warm up, measure, print."""
    given = json.loads(job)
    make = {"jaxalign": jaxalign, "transformers": transformers}[way]
    run = make(given["model"], given["prompts"], given["new"])
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
        "tokens": out.tolist(),
    }
    print(MARK + json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
