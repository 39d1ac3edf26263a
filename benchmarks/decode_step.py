"""Where the time of a sampled token goes, part by part, and what the machine could do at best.

Command:  python -m benchmarks.decode_step [--size 15M] [--batches 1 32] [--json FILE]
Time:     about two minutes on two CPU cores
Expect:   a table for each batch; the parts add up to most of the whole step

The whole is a step of `jaxalign.generation`: the time of a long response less that of its first
token. Each part is the package's own function on arrays of the step's shapes, compiled by itself
and repeated. CPU-seconds are those of all threads. The last rows are bounds: the multiplications at
the rate of one large product, and the bytes at the rate at which NumPy adds up an array.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.inputs import SHAPES, VOCABULARY, Shape, model_config
from benchmarks.machine import describe, figure, machine, median, table, write_json
from jaxalign.generation import Sampling, compile_generate
from jaxalign.generation.sampling import most_likely
from jaxalign.models import DecoderConfig, decoder, init_model
from jaxalign.models.cached_decoder import attend_slots, layers_of
from jaxalign.models.decoder_layer import layer_kinds, one_layer, queries_keys_values, rotations
from jaxalign.models.layers import dense, mlp_branch
from jaxalign.sharding import make_mesh


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M", "1B"] = "15M"
    """Parameters of the model."""
    batches: tuple[int, ...] = (1, 32)
    """Rows that are generated together."""
    prompt: int = 64
    """Tokens of a prompt."""
    new: int = 128
    """Tokens that are generated for each."""
    repeats: int = 5
    """How often each part is on the clock; medians are shown."""
    json: Path | None = None
    """Where to write all that was measured."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step: CPU-seconds, multiplications and additions, bytes that it must read."""

    name: str
    seconds: float
    operations: float = 0.0
    read: float = 0.0


def main(options: Options) -> None:
    """Measure and print."""
    facts, shape = machine(), SHAPES[options.size]
    config = model_config(shape, options.prompt + options.new)
    model = init_model(config, jax.random.key(0))
    print(f"{options.size}, prompts of {options.prompt}, {options.new} new; {describe(facts)}")
    product, reading = rates(options.repeats)
    content: dict[str, Any] = {"machine": facts, "product": product, "reading": reading}
    for batch in options.batches:
        whole, parts = measure(model, config, shape, batch, options)
        content[f"batch {batch}"] = {"whole": whole, "parts": [asdict(part) for part in parts]}
        rows = [line(part, whole) for part in parts]
        rest = Part(name="all else", seconds=whole - sum(part.seconds for part in parts))
        operations, read = sum(p.operations for p in parts), sum(p.read for p in parts)
        total = Part(name="a step", seconds=whole, operations=operations, read=read)
        bounds = [
            Part(name="products alone", seconds=operations / product, operations=operations),
            Part(name="reading alone", seconds=read / reading, read=read),
        ]
        rows += [line(part, whole) for part in (rest, total, *bounds)]
        header = ["part", "CPU-ms a step", "share", "GFLOP/s", "GB/s", "tokens/CPU-s"]
        for row, part in zip(rows, [*parts, rest, total, *bounds], strict=True):
            row.append(figure(batch / part.seconds, 0) if part in (total, *bounds) else "")
        print(f"\n{batch} rows:\n\n{table(header, rows)}")
    write_json(options.json, content)


def line(part: Part, whole: float) -> list[str]:
    """A row of the table."""
    rates = [x / part.seconds / 1e9 if x else None for x in (part.operations, part.read)]
    shown = ["" if x is None else figure(x, 1) for x in rates]
    return [part.name, figure(part.seconds * 1e3), f"{part.seconds / whole:.0%}", *shown]


def cpu_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of some calls, the first of which is not counted."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        before = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - before)
    return median(found)


def repeated(step: Callable[..., Any], begin: Any, *given: Any, times: int, repeats: int) -> float:
    """CPU-seconds of a step whose output is its next input."""

    def many(begin: Any, *given: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, x: step(x, *given), begin)

    run = jax.jit(many)
    return cpu_seconds(lambda: run(begin, *given), repeats) / times


def rates(repeats: int) -> tuple[float, float]:
    """Operations a CPU-second of a large product, and bytes a CPU-second that NumPy adds up."""
    x = jnp.ones((1024, 1024))

    def multiply(x: jax.Array) -> jax.Array:
        return jnp.matmul(x, x, precision="highest") * 1e-3

    product = 2 * 1024**3 / repeated(multiply, x, times=8, repeats=repeats)
    many = np.ones(2**26, np.float32)
    return product, many.nbytes / cpu_seconds(many.sum, repeats)


def measure(
    model: Any, config: DecoderConfig, shape: Shape, batch: int, options: Options
) -> tuple[float, list[Part]]:
    """CPU-seconds of a whole step, and its parts."""
    how = {"times": options.new // 2, "repeats": options.repeats}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (batch, options.prompt)), jnp.int32)
    lengths = jnp.full(batch, options.prompt, jnp.int32)

    def seconds(most: int) -> float:
        rules = Sampling(max_tokens=most, temperature=0.0)
        run = compile_generate(config, make_mesh(), sampling=rules)
        policies = [model.params]
        arguments = tokens, lengths, jax.random.key(0), jnp.ones(1), 0
        return cpu_seconds(lambda: run(policies, *arguments).tokens, options.repeats)

    whole = (seconds(options.new) - seconds(1)) / (options.new - 1)
    layers = layers_of(model.params["layers"], config.layers)
    x = jnp.asarray(rng.normal(size=(batch, 1, config.width)), jnp.float32)
    angles, kind = rotations(config, jnp.full((batch, 1), options.prompt)), layer_kinds(config)[0]

    def through(x: jax.Array, layers: list[Any]) -> jax.Array:
        """All layers, whose attention mixes nothing."""
        for layer in layers:

            def attend(y: jax.Array, layer: Any = layer) -> tuple[jax.Array, None]:
                q, k, v = queries_keys_values(y, layer, config, kind=kind, angles=angles)
                groups = config.heads // config.kv_heads
                mixed = q + jnp.repeat(k + v, groups, axis=2)
                return dense(mixed.reshape(batch, 1, -1), layer["o"]), None

            def mlp(y: jax.Array, layer: Any = layer) -> jax.Array:
                return mlp_branch(y, layer, config)

            x, _ = one_layer(x, layer, config, attend=attend, mlp=mlp)
        return x

    slots = options.prompt + options.new
    cached = batch, config.kv_heads, slots, config.head_width
    caches = [jnp.asarray(rng.normal(size=cached), jnp.float32) for _ in range(2 * config.layers)]
    seen = jnp.ones((batch, 1, slots), bool)

    def attention(q: jax.Array, caches: list[jax.Array]) -> jax.Array:
        for keys, values in zip(caches[::2], caches[1::2], strict=True):
            q = attend_slots(q, keys, values, seen, config).reshape(q.shape)
        return q

    def logits(x: jax.Array, params: Any) -> jax.Array:
        out = decoder.unembed(x[:, 0], config, *decoder.unembedding(params, config))
        return x + 1e-6 * out[:, None, : config.width]

    def chosen(x: jax.Array, params: Any) -> jax.Array:
        """Logits, and then a token with its log-prob."""
        out = decoder.unembed(x[:, 0], config, *decoder.unembedding(params, config))
        own = jnp.take_along_axis(out, most_likely(out)[:, None], axis=1)
        own = own - jax.nn.logsumexp(out, axis=-1, keepdims=True)
        return x + 1e-6 * own[:, None]

    head = VOCABULARY * config.width
    inner = shape.matrix_parameters - head
    entries = sum(cache.size for cache in caches)
    queries = x[:, 0, : config.heads * config.head_width]
    queries = queries.reshape(batch, 1, config.heads, config.head_width)
    of_logits = repeated(logits, x, model.params, **how)
    groups = config.heads // config.kv_heads
    return whole, [
        Part(
            name="products in layers",
            seconds=repeated(through, x, layers, **how),
            operations=2.0 * batch * inner,
            read=4.0 * inner,
        ),
        Part(
            name="attention over the cache",
            seconds=repeated(attention, queries, caches, **how),
            operations=2.0 * entries * groups,
            read=4.0 * entries,
        ),
        Part(
            name="logits",
            seconds=of_logits,
            operations=2.0 * batch * head,
            read=4.0 * head,
        ),
        Part(
            name="choice and log-probs",
            seconds=repeated(chosen, x, model.params, **how) - of_logits,
            read=4.0 * batch * VOCABULARY,
        ),
    ]


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
