"""DPO steps of a real model with per-pair gradient statistics, on packed rows and on padded ones.

Command:  python -m benchmarks.packed_probes --model FOLDER --data pairs.jsonl
Time:     about ten minutes for a model of 135 million parameters on two CPU cores
Expect:   statistics that differ by rounding, and about half the CPU-seconds of padded rows

Step by step in turn, at a learning rate of 0, so that all see the same parameters: the plain step
on packed rows; the probed step on the same pairs packed without shared prompts, which is what
`--entanglement.every` trains with; on the same pairs padded to the longest of the data, which it
read before; and on padded pairs of like length, which `--packing never` gives it. Programs are
compiled before the clock starts. Tokens are those of prompts and responses without padding.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.entanglement import peak
from benchmarks.machine import describe, figure, machine, median, table
from benchmarks.packed_sft import shapes_of
from jaxalign.data import (
    PairBatch,
    TokenizedPairs,
    load_tokenizer,
    pair_batches,
    preference_records,
    tokenize_pairs,
)
from jaxalign.data.packing import Packing, packed_batches
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.lora import init_adapters
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import PLAIN, initial_state, train_step

PLAIN_STEP, PROBED = "plain, packed", "probed, packed"
SAME, ALIKE = "probed, the same padded", "probed, of like length"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model: str
    """Folder of the model and its tokenizer."""
    data: str
    """File of preference pairs."""
    max_length: int = 512
    """Longest prompt plus response in tokens."""
    batch_size: int = 8
    """Pairs in a batch."""
    lora: int = 0
    """Rank of adapters on all matrices; 0: all parameters are trained."""
    remat: Literal["none", "full", "dots"] = "none"
    """As in training."""
    layers: int | None = None
    """Use at most so many first layers of the model, for less memory."""
    steps: int = 5
    """Steps of each kind."""


def main(options: Options) -> None:
    """Measure and print."""
    tokenizer, model = load_tokenizer(options.model), load_pretrained(options.model)
    records = list(preference_records(options.data))
    pairs, _ = tokenize_pairs(records, tokenizer, max_length=options.max_length)
    batches = batches_of(pairs, options)
    config, params = first_layers(model.config, model.params, options.layers)
    del model
    policy = Policy(config=config, remat=options.remat)
    frozen, trained = {"policy": None, "reference": params}, params
    if options.lora:
        policy = dataclasses.replace(policy, adapter_scale=1.0)
        trained = init_adapters(params, jax.random.key(0), rank=options.lora, targets=["*"])
        frozen["policy"] = params
    objective: Any = PreferenceObjective(policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={})
    optimizer = make_optimizer("adamw", 0.0)
    state = initial_state(jax.tree.map(jnp.copy, trained), optimizer, seed=0)
    step = partial(train_step, objective=objective, optimizer=optimizer)
    programs: dict[Any, jax.stages.Compiled] = {}
    for name, known in batches.items():
        probe = PLAIN if name == PLAIN_STEP else PairProbe(objective=objective)
        jitted = jax.jit(partial(step, backward=probe), donate_argnums=0)
        for batch in known:
            if (name, *shapes_of(batch.pairs)) not in programs:
                lowered = jitted.lower(state, frozen, batch)
                programs[name, *shapes_of(batch.pairs)] = lowered.compile()
    measured: dict[str, list[tuple[float, float, int]]] = {name: [] for name in batches}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in batches}
    for at in range(options.steps):
        for name, known in batches.items():
            batch = known[at]
            run = programs[name, *shapes_of(batch.pairs)]
            began, cpu = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(run(state, frozen, batch))
            seconds = time.perf_counter() - began, time.process_time() - cpu
            tokens = int((batch.pairs.prompt_length + batch.pairs.response_length).sum())
            measured[name].append((*seconds, tokens))
            means = {k: m for k, m in metrics.items() if k.startswith("entanglement")}
            seen[name].append({k: float(m.value()) for k, m in means.items()})
    rows, rates = [], {}
    for name, steps in measured.items():
        wall, cpu, tokens = zip(*steps, strict=True)
        rates[name] = sum(tokens) / sum(cpu)
        memory = max(peak(p.memory_analysis()) for key, p in programs.items() if key[0] == name)
        rows.append((name, median(wall), median(cpu), rates[name], memory / 1e6))
    kind = f"LoRA rank {options.lora}" if options.lora else "all parameters"
    print(f"{options.model} on {options.data}, {kind}, {options.steps} steps, {options.batch_size}")
    print(describe(machine()))
    header = ["step", "seconds", "CPU-seconds", "tokens/CPU-s", "probed packed / own", "MB"]
    print(
        table(header, [[n, *map(figure, (*x[:3], rates[PROBED] / x[2], x[3]))] for n, *x in rows])
    )
    print(f"statistics of packed and padded rows: {difference(seen[PROBED], seen[SAME])}")


def first_layers(config: DecoderConfig, params: Any, layers: int | None) -> tuple[Any, Any]:
    """The model without its later layers; None: all of it."""
    if layers is None or layers >= config.layers:
        return config, params
    first = jax.tree.map(lambda x: x[:layers], params["layers"])
    kinds = {"windowed": config.windowed[:layers], "unrotated": config.unrotated[:layers]}
    return dataclasses.replace(config, layers=layers, **kinds), {**params, "layers": first}


def batches_of(pairs: TokenizedPairs, options: Options) -> dict[str, list[ReferencedBatch]]:
    """The batches of each kind of step."""
    order: dict[str, Any] = {"batch_size": options.batch_size, "seed": 0}
    packed = list(islice(packed_batches(pairs, Packing(apart=True), **order), options.steps))
    alike = list(islice(pair_batches(pairs, **order), options.steps))

    def referenced(known: list[PairBatch]) -> list[ReferencedBatch]:
        return [ReferencedBatch(pairs=batch, reference=None) for batch in known]

    return {
        PLAIN_STEP: referenced(packed),
        PROBED: referenced(packed),
        SAME: referenced([dataclasses.replace(x, packed_apart=None) for x in packed]),
        ALIKE: referenced(alike),
    }


def difference(found: list[dict[str, float]], expected: list[dict[str, float]]) -> str:
    """The largest difference of any mean, relative to the mean."""
    apart = {
        name: max(
            abs(a[name] - b[name]) / abs(b[name])
            for a, b in zip(found, expected, strict=True)
            if np.isfinite(b[name]) and b[name]
        )
        for name in expected[0]
        if any(np.isfinite(b[name]) and b[name] for b in expected)
    }
    name = max(apart, key=lambda name: apart[name])
    return f"they differ by at most {apart[name]:.1e} ({name})"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
