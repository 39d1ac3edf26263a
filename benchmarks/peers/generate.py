"""Greedy generation by one library: the same prompts again and again, each time on the clock."""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recorder import MARK, peak_memory

Generate = Callable[[], list[list[int]]]
"""Runs to the end; the new tokens of each prompt, with the end token."""


def jaxalign(job: Mapping[str, Any]) -> Generate:
    """What `jaxalign generate` runs: rows that have ended make room for the next prompts."""
    import jax
    import jax.numpy as jnp

    from jaxalign.generation import Sampling
    from jaxalign.generation.continuous import compile_programs, sample_continuously
    from jaxalign.generation.rows import Method, Source
    from jaxalign.generation.weights import prepare
    from jaxalign.models import load_pretrained

    model = load_pretrained(job["model"])
    rules = Sampling(max_tokens=job["new"], temperature=0.0, end_tokens=tuple(job["ends"]))
    dtype = jnp.dtype(job["dtype"])
    method = Method(config=model.config, sampling=rules, dtype=dtype)
    prepared = jax.jit(prepare, static_argnames=("config", "dtype", "in_int8"))
    in_int8 = job["weights"] == "int8"
    weights = prepared(model.params, config=model.config, dtype=dtype, in_int8=in_int8)
    key, one = jax.random.key(0), jnp.ones(1)
    source = Source(policies=[weights], mixture=one, key=key, stops=None)
    programs, prompts = compile_programs(method), job["prompts"]
    numbers = [[at] for at in range(len(prompts))]

    def padded(length: int) -> int:
        return next(size for size in (2**n for n in range(5, 30)) if size >= length)

    def run() -> list[list[int]]:
        out: dict[int, list[int]] = {}
        given = programs, source, method, prompts, numbers
        for response in sample_continuously(*given, rows=job["rows"], padded=padded):
            out[response.prompt] = response.tokens.tolist()
        return [out[at] for at in range(len(prompts))]

    return run


def transformers(job: Mapping[str, Any]) -> Generate:
    """`generate` of the model class, with its cache; the prompts in batches, in order."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval().to(device)
    ends, rows, prompts = job["ends"], job["rows"], job["prompts"]
    rules: dict[str, Any] = {"do_sample": False, "max_new_tokens": job["new"], "pad_token_id": 0}
    rules |= {"eos_token_id": ends} if ends else {"min_new_tokens": job["new"]}

    def batch(mine: list[list[int]]) -> list[list[int]]:
        width = max(map(len, mine))
        filled = [[0] * (width - len(row)) + row for row in mine]
        real = [[0] * (width - len(row)) + [1] * len(row) for row in mine]
        tokens, mask = (torch.tensor(rows, device=device) for rows in (filled, real))
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, **rules)[:, width:].tolist()
        at_end = [next((n + 1 for n, x in enumerate(row) if x in ends), len(row)) for row in out]
        return [row[:end] for row, end in zip(out, at_end, strict=True)]

    def run() -> list[list[int]]:
        batches = [batch(prompts[at : at + rows]) for at in range(0, len(prompts), rows)]
        return [row for rows_of in batches for row in rows_of]

    return run


def llama(job: Mapping[str, Any]) -> Generate:
    """The server of llama.cpp, in this process: a slot for each row, all prompts requested at once.

    Requests go through its HTTP interface, the only one that takes and returns tokens.
    """
    import xllamacpp

    rows, ends, prompts, cores = job["rows"], job["ends"], job["prompts"], os.cpu_count() or 1
    params = xllamacpp.CommonParams()
    params.model.path = job["weights"]
    params.n_ctx = rows * (max(map(len, prompts)) + job["new"] + 8)
    params.n_parallel, params.cache_prompt, params.cache_ram_mib = rows, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
    server = xllamacpp.Server(params)
    rules = {
        "n_predict": job["new"],
        "temperature": 0.0,
        "ignore_eos": not ends,
        "return_tokens": True,
        "cache_prompt": False,
    }

    def ask(prompt: list[int]) -> list[int]:
        content = json.dumps({"prompt": prompt, **rules}).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", content, header)
        with urllib.request.urlopen(request) as reply:
            answer = json.load(reply)
        ended = answer["stop_type"] == "eos" and answer["tokens"][-1:] != ends[:1]
        return answer["tokens"] + (ends[:1] if ended else [])

    def run() -> list[list[int]]:
        with ThreadPoolExecutor(rows) as pool:
            return list(pool.map(ask, prompts))

    return run


def device_peak() -> int:
    """Bytes of PyTorch's largest use of a GPU; 0 where there is none."""
    torch = sys.modules.get("torch")
    return 0 if torch is None else torch.cuda.max_memory_allocated()


def main(way: str, job: str) -> None:
    """Warm up, measure, print.

    Args:
      way: name of the library.
      job: JSON, or "@FILE" with it: model, prompts, new (tokens), repeats; and, where they differ
        from these, dtype (float32), ends (none), rows (all prompts), and weights (float; int8 for
        jaxalign, a GGUF file for llama).
    """
    text = Path(job[1:]).read_text() if job.startswith("@") else job
    given = {"dtype": "float32", "ends": [], "weights": "float"} | json.loads(text)
    given.setdefault("rows", len(given["prompts"]))
    run = {"jaxalign": jaxalign, "transformers": transformers, "llama": llama}[way](given)
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
        "tokens": out,
    }
    print(MARK + json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
