"""SFT of a real model with adapters on packed rows, and on the same responses padded.

Command:  python -m benchmarks.packed_sft --model FOLDER --data pairs.jsonl
Time:     about five minutes for a model of 135 million parameters on two CPU cores
Expect:   losses that differ by rounding, and more tokens a second

One run for each kind of batches, step by step in turn: the packed batches, the same responses
padded, and padded batches of responses of like length, which `--sft.packing never` would train on.
Padded rows have the lengths that `pair_batches` chooses. Programs are compiled before the clock
starts. Tokens are those of prompts and responses without padding.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.machine import describe, figure, machine, median, table
from jaxalign.config import LoraConfig
from jaxalign.data import (
    PairBatch,
    TokenizedResponses,
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_responses,
)
from jaxalign.data.batches import choose_buckets, padded_pairs
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.models import load_pretrained
from jaxalign.models.lora import init_adapters
from jaxalign.representation import responses_of
from jaxalign.training.objectives import Policy, SupervisedObjective
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.step import initial_state, train_step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model: str
    """Folder of the model and its tokenizer."""
    data: str
    """File of preference pairs; their chosen responses are imitated."""
    max_length: int = 512
    """Longest prompt plus response in tokens."""
    batch_size: int = 8
    """Responses in a batch."""
    rank: int = 16
    """Rank of the adapters."""
    steps: int = 8
    """Updates of each run."""


def main(options: Options) -> None:
    """Measure and print."""
    records = responses_of(list(preference_records(options.data)), "chosen")
    tokenizer, model = load_tokenizer(options.model), load_pretrained(options.model)
    rows, _ = tokenize_responses(records, tokenizer, max_length=options.max_length)
    batches = batches_of(TokenizedResponses(rows=rows), options)
    adapters = LoraConfig(rank=options.rank)
    policy = Policy(config=model.config, adapter_scale=adapters.scale, remat="dots")
    optimizer = make_optimizer("adamw", 2e-4)
    objective: Any = SupervisedObjective(policy=policy)
    step = jax.jit(partial(train_step, objective=objective, optimizer=optimizer))
    frozen = {"policy": model.params, "reference": None}
    targets = {"rank": adapters.rank, "targets": adapters.targets}
    trained = init_adapters(model.params, jax.random.key(0), **targets)
    states = dict.fromkeys(batches, initial_state(trained, optimizer, seed=0))
    programs: dict[Any, jax.stages.Compiled] = {}
    for name, known in batches.items():
        for batch in known:
            if shapes_of(batch) not in programs:
                lowered = step.lower(states[name], frozen, batch)
                programs[shapes_of(batch)] = lowered.compile()
    measured: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in batches}
    for at in range(options.steps):
        for name, known in batches.items():
            batch = known[at]
            began, cpu = time.perf_counter(), time.process_time()
            run = programs[shapes_of(batch)]
            states[name], metrics = jax.block_until_ready(run(states[name], frozen, batch))
            seconds = time.perf_counter() - began, time.process_time() - cpu
            tokens = int((batch.prompt_length + batch.response_length).sum())
            measured[name].append((float(metrics["loss"].value()), *seconds, tokens))
    show(measured, options)


def batches_of(examples: TokenizedResponses, options: Options) -> dict[str, list[PairBatch]]:
    """The batches of each run."""
    order: dict[str, Any] = {"batch_size": options.batch_size, "seed": 0}
    packed = list(islice(packed_batches(examples, Packing(), **order), options.steps))
    lengths = examples.length[:, 0]
    edges, same = np.array(choose_buckets(lengths)), []
    for batch in packed:
        members = batch.record_index
        length = int(edges[np.searchsorted(edges, lengths[members].max())])
        response = -(-int(batch.response_length.max()) // 8) * 8
        same.append(padded_pairs(examples, members, batch.weight, length, response))
    alike = list(islice(pair_batches(examples, **order), options.steps))
    return {"packed": packed, "the same, padded": same, "of like length, padded": alike}


def shapes_of(batch: PairBatch) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch, each of which is a program."""
    return tuple(x.shape for x in jax.tree.leaves(batch))


def show(measured: dict[str, list[tuple[float, float, float, int]]], options: Options) -> None:
    """The table, and how far the losses are apart."""
    rates = {}
    for name, steps in measured.items():
        _, wall, cpu, tokens = (sum(x) for x in zip(*steps, strict=True))
        rates[name] = tokens / wall, tokens / cpu
    rows = []
    for name, steps in measured.items():
        _, wall, cpu, _ = zip(*steps, strict=True)
        ratio = [a / b for a, b in zip(rates["packed"], rates[name], strict=True)]
        each = [median(wall), median(cpu), *rates[name]]
        rows.append([name, *map(figure, each), *map(figure, ratio)])
    header = ["batches", "seconds", "CPU-seconds", "tokens/s", "tokens/CPU-s", "packed's / own"]
    print(f"{options.model} on {options.data}, {options.steps} steps of {options.batch_size}")
    print(describe(machine()))
    print(table([*header, "in CPU-seconds"], rows))
    losses = {name: np.array([x[0] for x in steps]) for name, steps in measured.items()}
    apart = np.abs(losses["packed"] - losses["the same, padded"]).max()
    first, *_, last = losses["packed"]
    print(
        f"losses of packed and padded rows differ by at most {apart:.1e} ({first:.4f}, {last:.4f})"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
