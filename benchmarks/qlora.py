"""Adapters over weights in 32, 16, 8 and 4 bits: memory and time of a DPO step.

Command:  python -m benchmarks.qlora [--size 15M | --model FOLDER [--data pairs.jsonl]]
          [--weights bfloat16 int8 nf4] [--json FILE]
Time:     minutes on two CPU cores; on an H100
          `python -m benchmarks.qlora --size 8B --json qlora.json` takes about a minute
Expect:   one table; with nf4 the weights of the layers take 0.28 of their bytes in bfloat16

A size has random weights, made in the form in which they are stored; `--model` has real ones, which
are quantised as `--lora.weights` does. All steps have the same batch and the same new adapters. The
programs are compiled together before the first step; then each runs its steps by itself, so that
its weights are the only ones on the device, and its line is written as soon as it is measured.

Weights are the bytes of the frozen parameters; the program is what the compiler asks for:
parameters, optimiser state, batch and temporaries. With `--data`, the last column has the mean
log-prob of a chosen response at the first step, when the adapters do nothing yet: what quantisation
changes.
"""

import concurrent.futures
import functools
import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks import entanglement
from benchmarks.inputs import SHAPES, model_config
from benchmarks.machine import describe, figure, machine, median, table, write_json
from jaxalign.config import LoraConfig
from jaxalign.data import load_tokenizer, pair_batches, preference_records, tokenize_pairs
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.decoder import init_params
from jaxalign.models.devices import compiling_for
from jaxalign.models.folders import read_config
from jaxalign.models.lora import init_adapters
from jaxalign.models.quantised import NF4, in_fewer_bits
from jaxalign.training.metrics import to_floats
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.optimizers import make_optimizer
from jaxalign.training.step import initial_state, train_step

Weights = Literal["float32", "bfloat16", "int8", "nf4"]
SIZES = {name: name for name in ("1M", "15M", "135M")}
SIZES |= {"1B": "llama-3.2-1b", "8B": "llama-3-8b"}
HEADER = ["weights", "weights GB", "program GB", "temporaries GB", "seconds", "CPU-seconds"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "135M", "1B", "8B"] = "15M"
    """Parameters of a model with random weights."""
    model: Path | None = None
    """Hugging Face folder of a model with real weights, instead of `size`."""
    data: Path | None = None
    """Preference pairs for the model of a folder; None: random tokens."""
    weights: tuple[Weights, ...] = ("bfloat16", "int8", "nf4")
    """How the frozen weights are stored; ratios are to the first."""
    length: int = 1024
    """Tokens of prompt and response together; of `data`, the largest number."""
    pairs: int = 2
    """Pairs in a batch."""
    rank: int = 16
    """Rank of the adapters, on all matrices."""
    remat: Literal["none", "full", "dots"] = "dots"
    """As in training."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """As in training."""
    skip: int = 2
    """Steps that warm up."""
    steps: int = 5
    """Steps that are counted; their median is shown."""
    json: Path | None = None
    """Where to write all that was measured."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured with weights of one kind."""

    weights: str
    weight_bytes: int
    program_bytes: int
    temporary_bytes: int
    seconds: list[float]
    cpu_seconds: list[float]
    log_prob: float
    """Mean log-prob of a chosen response at the first step, in nats."""
    loss: float
    """At the last step."""


def main(options: Options) -> None:
    """Measure and print."""
    facts, config = machine(), config_of(options)
    print(
        f"{options.model or options.size}, {options.pairs} pairs of 2 x {options.length} tokens, "
        f"{options.dtype}, adapters of rank {options.rank}, remat {options.remat}; "
        f"{describe(facts)}, jax {jax.__version__}"
    )
    policies = {
        weights: Policy(
            config=config,
            adapter_scale=1.0,
            weights=weights,
            remat=options.remat,
            dtype=jnp.dtype(options.dtype),
        )
        for weights in options.weights
    }
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rule, batch = make_optimizer("adamw", 1e-5), batch_of(options, config)
    adapters = init_adapters(
        shapes, jax.random.key(1), rank=options.rank, targets=LoraConfig().targets
    )
    state = initial_state(adapters, rule, seed=0)
    start = time.perf_counter()
    with compiling_for(jax.default_backend(), 1):
        lowered = {}
        for weights, policy in policies.items():
            objective = PreferenceObjective(
                policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={"beta": 0.1}
            )
            step = functools.partial(train_step, objective=objective, optimizer=rule)
            stored = in_form(policy, shapes)
            frozen = {"policy": stored, "reference": stored}
            lowered[weights] = jax.jit(step).lower(state, frozen, batch)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiled = dict(
                zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True)
            )
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    rows: list[Row] = []
    for weights, policy in policies.items():
        made = weights_of(options, policy, shapes)
        rows.append(measure(weights, compiled[weights], state, made, batch, options))
        del made
        cells = zip(HEADER[1:], line(rows[-1], rows[0])[1:], strict=False)
        print(f"{weights}: " + ", ".join(f"{name} {x}" for name, x in cells), flush=True)
        content = {"machine": facts, "options": asdict(options), "rows": [asdict(x) for x in rows]}
        write_json(options.json, jax.tree.map(_plain, content))
    print()
    header = [*HEADER, "program to first", "seconds to first", "log-prob"]
    print(table(header, lines(rows, options)))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def config_of(options: Options) -> DecoderConfig:
    """The architecture."""
    if options.model is None:
        return model_config(SHAPES[SIZES[options.size]], options.length)
    return read_config(options.model)


def batch_of(options: Options, config: DecoderConfig) -> ReferencedBatch:
    """The first pairs of the data, or pairs of random tokens."""
    if options.model is None or options.data is None:
        sizes = {"length": options.length, "pairs": options.pairs}
        return entanglement.random_batch(
            entanglement.Options(vocabulary=config.vocab_size, **sizes)
        )
    records = itertools.islice(preference_records(str(options.data)), 2 * options.pairs)
    pairs, _ = tokenize_pairs(records, load_tokenizer(options.model), max_length=options.length)
    pair_batch = next(iter(pair_batches(pairs, buckets=1, batch_size=options.pairs, shuffle=False)))
    return ReferencedBatch(pairs=jax.tree.map(jnp.asarray, pair_batch), reference=None)


def in_form(policy: Policy, params: Any) -> Any:
    """Parameters, or their shapes, as a run's devices store them."""
    if policy.weights == "float32":
        return params
    return in_fewer_bits(params, policy.weights, policy.dtype)


def weights_of(options: Options, policy: Policy, shapes: Any) -> Any:
    """The frozen parameters: those of the folder, or random ones."""
    if options.model is not None:
        return in_form(policy, load_pretrained(options.model, dtype=jnp.float32).params)
    deviation = policy.config.initializer_range
    keys = iter(jax.random.split(jax.random.key(2), 1000))

    @functools.partial(jax.jit, static_argnums=1)
    def codes(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:  # all equally often
        bits = jax.random.bits(key, like.shape, jnp.uint8)
        return jax.lax.bitcast_convert_type(bits, like.dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return (deviation * jax.random.normal(key, like.shape, like.dtype)).astype(like.dtype)

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        of_codes = getattr(path[-1], "name", None)
        if of_codes == "codes":
            return codes(next(keys), like)
        if of_codes == "scale":
            values = jnp.asarray(NF4) if policy.weights == "nf4" else jnp.arange(-128.0, 128)
            return jnp.full(like.shape, deviation / jnp.std(values), like.dtype)
        if path[-1].key in ("scale", "bias"):
            return jnp.full(like.shape, float(path[-1].key == "scale"), like.dtype)
        return normal(next(keys), like)

    return jax.tree_util.tree_map_with_path(leaf, in_form(policy, shapes))


def measure(
    weights: str, program: Any, state: Any, frozen: Any, batch: ReferencedBatch, options: Options
) -> Row:
    """Steps of one program, each waited for."""
    both, seconds, cpu, metrics = {"policy": frozen, "reference": frozen}, [], [], []
    for _ in range(options.skip + options.steps):
        start, used = time.perf_counter(), time.process_time()
        state, seen = jax.block_until_ready(program(state, both, batch))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        metrics.append(to_floats(jax.device_get(seen)))
    memory = program.memory_analysis()
    stored = sum(x.nbytes for x in jax.tree.leaves(frozen))
    return Row(
        weights=weights,
        weight_bytes=stored,
        # policy and reference are two arguments with the same buffers
        program_bytes=entanglement.peak(memory) - stored,
        temporary_bytes=memory.temp_size_in_bytes,
        seconds=seconds[options.skip :],
        cpu_seconds=cpu[options.skip :],
        log_prob=metrics[0]["logps/chosen"],
        loss=metrics[-1]["loss"],
    )


def line(row: Row, first: Row) -> list[str | None]:
    """Cells of a row, with ratios to the first."""
    sizes = row.weight_bytes, row.program_bytes, row.temporary_bytes
    times = median(row.seconds), median(row.cpu_seconds)
    ratios = row.program_bytes / first.program_bytes, times[0] / median(first.seconds)
    return [
        row.weights,
        *(figure(size / 1e9, 3) for size in sizes),
        *(figure(x, 3) for x in times),
        *map(figure, ratios),
    ]


def lines(rows: list[Row], options: Options) -> list[list[str | None]]:
    """All rows; log-probs of random weights or tokens say nothing."""
    real = options.model is not None and options.data is not None
    return [[*line(row, rows[0]), figure(row.log_prob) if real else None] for row in rows]


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
