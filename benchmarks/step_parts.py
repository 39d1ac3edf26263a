"""Where the time of a DPO step goes, and what the machine would allow.

Command:  python -m benchmarks.step_parts [--size 15M] [--pairs 8] [--prompt 128]
          [--dtypes float32 bfloat16]
Time:     two minutes and data type on two CPU cores at 15M; the first time pip fetches torch, too
Expect:   a table of the parts of one step of the trainer: CPU-seconds, FLOPs by formula and the
          rate of both; the rates at which JAX and PyTorch multiply the same shapes with nothing
          around them, forward (x W) and backward (dy W', x' dy): as plain products of the data
          type and in the form that `jaxalign.models.products` chooses; and the least that a step
          can cost at the best of these rates

Each part is compiled by itself with the shapes of the step (a pair's prompt computed once, layers
rematerialised, a live reference) and run in turn with the others, round by round; the median of the
CPU-seconds counts, as far as a busy machine takes longer but not more of them. The parts need not
add up to the step, which has more between them.
"""

import dataclasses
import functools
import json
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from jaxtyping import Array

from benchmarks import environments, inputs
from benchmarks.machine import describe, figure, machine, run, table, write_json
from benchmarks.shared_prompts import random_pairs
from jaxalign.losses import dpo
from jaxalign.models import DecoderConfig, products
from jaxalign.models.attention import attention
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import Layout, hidden_states, init_params, unembedding
from jaxalign.models.logprobs import token_log_probs
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import initial_state, train_step

Sizes = tuple[int, int, int]
"""Rows, inner size and columns of a product."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M", "135M"] = "15M"
    """Parameters of the model, with its 32,000 tokens tied."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Data types of the computation; parameters are float32."""
    pairs: int = 8
    """Pairs in a batch."""
    prompt: int = 128
    """Tokens of every prompt."""
    response: int = 128
    """Tokens of every response."""
    rounds: int = 5
    """Rounds after the first, which compiles."""
    environments: Path = environments.DEFAULT
    """Where the peers' virtual environments are kept."""
    json: Path | None = None
    """Where to write all that was measured."""


@dataclass(frozen=True)
class Part:
    """Something that a step does, by itself."""

    name: str
    run: Callable[[], Any]
    flops: float
    """By formula; of products alone."""


def main(options: Options) -> None:
    """Measure and print."""
    shape = inputs.SHAPES[options.size]
    parts: dict[str, list[Part]] = {}
    forms: dict[tuple[str, Sizes, str], tuple[Part, Part]] = {}
    for dtype in options.dtypes:
        parts[dtype], shapes = step_parts(options, shape, dtype)
        for sizes in shapes:
            for form, plain, chosen in products_of(sizes, dtype):
                forms[dtype, sizes, form] = plain, chosen
    every = [part for own in parts.values() for part in own]
    every += [part for both in forms.values() for part in both]
    measured = in_turn(every, options.rounds)
    python = environments.python_of("torch", options.environments)
    script = str(Path(__file__).parent / "peers" / "torch_products.py")
    job = {"products": list(forms), "rounds": options.rounds}
    recorded = run([python, script, json.dumps(job)]).recorded
    if recorded is None:
        sys.exit("the products in PyTorch failed")
    facts = machine()
    print(
        f"{options.size}, {options.pairs} pairs, prompt {options.prompt}, responses "
        f"{options.response}; {describe(facts)}, jax {jax.__version__}"
    )

    def rate(part: Part, seconds: float | None = None) -> float:
        return part.flops / (seconds or measured[part.name]) / 1e9

    rows: list[list[Any]] = []
    for number, part in enumerate(parts[options.dtypes[0]]):
        row: list[Any] = [part.name.partition(": ")[2]]
        row.append(figure(part.flops / 1e9, 0) if part.flops else None)
        for dtype in options.dtypes:
            own = parts[dtype][number]
            row += [figure(measured[own.name], 3), figure(rate(own), 0) if own.flops else None]
        rows.append(row)
    header = ["part", "GFLOP"]
    for dtype in options.dtypes:
        header += [f"CPU-seconds, {dtype}", "GFLOP a CPU-second"]
    print(table(header, rows))
    print()
    rates = [
        [
            f"{dtype}, {' × '.join(f'{size:,}' for size in sizes)}, {form}",
            figure(rate(plain), 0),
            figure(rate(chosen), 0),
            figure(rate(plain, seconds), 0),
        ]
        for ((dtype, sizes, form), (plain, chosen)), seconds in zip(
            forms.items(), recorded["cpu_seconds"], strict=True
        )
    ]
    print(table(["GFLOP a CPU-second", "JAX, plain", "jaxalign", "PyTorch"], rates))
    for dtype in options.dtypes:
        best = max(rate(chosen) for (kind, *_), (_, chosen) in forms.items() if kind == dtype)
        own = parts[dtype][-1]
        print(
            f"{dtype}: at the best rate of jaxalign's products, {best:.0f} GFLOP a CPU-second, the "
            f"step's own products take {own.flops / best / 1e9:.2f} CPU-seconds of "
            f"{measured[own.name]:.2f}"
        )
    content = {"machine": facts, "options": {"size": options.size}, "cpu_seconds": measured}
    content["torch_cpu_seconds"] = dict(
        zip((", ".join(map(str, key)) for key in forms), recorded["cpu_seconds"], strict=True)
    )
    content["flops"] = {part.name: part.flops for part in every}
    write_json(options.json, content)


def in_turn(parts: list[Part], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each part, run in turn."""
    seconds: dict[str, list[float]] = {part.name: [] for part in parts}
    for number in range(rounds + 1):
        for part in parts:
            before = _cpu_seconds()
            jax.block_until_ready(part.run())
            if number:
                seconds[part.name].append(_cpu_seconds() - before)
    return {name: statistics.median(own) for name, own in seconds.items()}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def step_parts(options: Options, shape: inputs.Shape, dtype: str) -> tuple[list[Part], list[Sizes]]:
    """The parts of a step, the whole step last, and the sizes of its products."""
    head = shape.width // shape.heads
    config = DecoderConfig(
        vocab_size=inputs.VOCABULARY,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=head,
        mlp_width=shape.mlp_width,
        context_length=options.prompt + 2 * options.response,
        tied=True,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    pairs: Any = random_pairs(options)
    batch = ReferencedBatch(pairs=jax.tree.map(jnp.asarray, pairs), reference=None)
    rows = pairs.joint_tokens.shape
    tokens, responses = rows[0] * rows[1], pairs.response_tokens.size
    joint = jnp.asarray(pairs.joint_tokens)
    place = jnp.broadcast_to(jnp.arange(rows[1])[None], rows)
    second = options.prompt + options.response
    segments = 1 + (place >= options.prompt) + (place >= second)
    seen = {
        "segment_ids": segments,
        "prefix_ids": jnp.where(segments == 1, 0, 1),
        "positions": jnp.where(place < second, place, place - options.response),
    }
    layout = Layout(**seen)
    keys = jax.random.split(jax.random.key(1), 3)
    heads = shape.heads, shape.kv_heads, shape.kv_heads
    q, k, v = (
        jax.random.normal(key, (*rows, number, head), dtype)
        for key, number in zip(keys, heads, strict=True)
    )
    states = jax.random.normal(keys[0], (responses, shape.width), dtype)
    targets = jnp.asarray(pairs.response_tokens).reshape(-1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    objective = PreferenceObjective(
        policy=Policy(config=config, remat="full", dtype=jnp.dtype(dtype)),
        loss=dpo,
        options={"beta": 0.1},
    )
    state = initial_state(params, optimizer, seed=0)

    def layers(params: Any, remat: str) -> jax.Array:
        compute = Compute(remat=remat, dtype=jnp.dtype(dtype))
        return hidden_states(params, config, joint, layout, compute=compute).sum(dtype=jnp.float32)

    def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, scale=config.scale, **seen).sum(dtype=jnp.float32)

    def logits(states: jax.Array, params: Any) -> jax.Array:
        kernel, _ = unembedding(params, config)
        return token_log_probs(states, kernel, targets).log_prob.sum()

    compiled = {
        "layers": jax.jit(lambda params: layers(params, "none")),
        "layers' gradient": jax.jit(jax.grad(lambda params: layers(params, "full"))),
        "attention": jax.jit(attended),
        "attention's gradient": jax.jit(jax.grad(attended, argnums=(0, 1, 2))),
        "logits": jax.jit(logits),
        "logits' gradient": jax.jit(jax.grad(logits, argnums=(0, 1))),
        "update": jax.jit(lambda grads, state: optimizer.update(grads, state.opt_state, params)),
        "step": jax.jit(
            lambda state: train_step(
                state,
                {"policy": None, "reference": params},
                batch,
                objective=objective,
                optimizer=optimizer,
            )
        ),
    }
    each_layer = 2 * tokens * (shape.matrix_parameters - inputs.VOCABULARY * shape.width)
    each_logits = 2 * responses * inputs.VOCABULARY * shape.width
    each_attention = 4 * tokens * rows[1] * shape.heads * head  # of one layer, every score
    attending = shape.layers * each_attention
    parts = [
        Part(
            "reference: layers",
            lambda: compiled["layers"](params),
            each_layer + attending,
        ),
        Part("reference: logits", lambda: compiled["logits"](states, params), each_logits),
        Part(
            "policy: layers, rematerialised, and their gradient",
            lambda: compiled["layers' gradient"](params),
            4 * each_layer + 5 * attending,
        ),
        Part(
            "of it attention of one layer, forward",
            lambda: compiled["attention"](q, k, v),
            each_attention,
        ),
        Part(
            "and its gradient",
            lambda: compiled["attention's gradient"](q, k, v),
            4 * each_attention,
        ),
        Part(
            "policy: logits, formed twice, and their gradient",
            lambda: compiled["logits' gradient"](states, params),
            4 * each_logits,
        ),
        Part("AdamW, clipped", lambda: compiled["update"](params, state), 0),
        Part(
            "whole step",
            lambda: compiled["step"](state),
            5 * each_layer + 5 * each_logits,
        ),
    ]
    parts = [dataclasses.replace(part, name=f"{dtype}: {part.name}") for part in parts]
    shapes = (
        (tokens, shape.width, shape.mlp_width),
        (tokens, shape.mlp_width, shape.width),
        (512, shape.width, 2048),
        (responses, shape.width, inputs.VOCABULARY),
        (2048, 2048, 2048),
    )
    return parts, list(dict.fromkeys(shapes))


def products_of(sizes: Sizes, dtype: str) -> Iterator[tuple[str, Part, Part]]:
    """Each product of a layer: its name, as a plain product, and as `products` has it."""
    m, inner, n = sizes
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (m, inner), dtype)
    kernel = jax.random.normal(keys[1], (inner, n), dtype)
    dy = jax.random.normal(keys[2], (m, n), dtype)
    forms: list[tuple[str, Callable, Callable, tuple[Array, Array]]] = [
        ("x W", jnp.matmul, products.product, (x, kernel)),
        ("dy W'", lambda dy, w: jnp.matmul(dy, w.T), products.transposed_product, (dy, kernel)),
        ("x' dy", lambda x, dy: jnp.matmul(x.T, dy), products.kernel_gradient, (x, dy)),
    ]
    for name, plain, chosen, arguments in forms:

        def part(kind: str, function: Callable, name=name, arguments=arguments) -> Part:
            run = functools.partial(jax.jit(function), *arguments)
            return Part(f"{dtype} {sizes} {name}, {kind}", run, 2.0 * m * inner * n)

        yield name, part("plain", plain), part("jaxalign", chosen)


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
