"""Where the time of a DPO step goes, and what the machine would allow.

Command:  python -m benchmarks.step_parts [--size 15M] [--pairs 8] [--prompt 128]
Time:     two minutes on two CPU cores at 15M; the first time pip fetches torch, too
Expect:   a table of the parts of one step of the trainer: CPU-seconds, FLOPs by formula and the
          rate of both; the rates at which JAX and PyTorch multiply the same shapes with nothing
          around them; and the least that a step can cost at the best of these rates

Each part is compiled by itself with the shapes of the step (a pair's prompt computed once, layers
rematerialised, a live reference) and run in turn with the others, round by round; the median of the
CPU-seconds counts, as far as a busy machine takes longer but not more of them. The parts need not
add up to the step, which has more between them.
"""

import json
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks import environments, inputs
from benchmarks.machine import describe, figure, machine, run, table, write_json
from benchmarks.shared_prompts import random_pairs
from jaxalign.losses import dpo
from jaxalign.models import DecoderConfig
from jaxalign.models.attention import attention
from jaxalign.models.compute import Compute
from jaxalign.models.decoder import Layout, hidden_states, init_params, unembedding
from jaxalign.models.logprobs import token_log_probs
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import initial_state, train_step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "110M"] = "15M"
    """Parameters of the model, with its 32,000 tokens tied."""
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
    parts, products = step_parts(options, shape)
    measured = in_turn([*parts, *products.values()], options.rounds)
    python = environments.python_of("torch", options.environments)
    script = str(Path(__file__).parent / "peers" / "torch_products.py")
    job = {"shapes": list(products), "rounds": options.rounds}
    recorded = run([python, script, json.dumps(job)]).recorded
    if recorded is None:
        sys.exit("the products in PyTorch failed")
    rates = [
        [
            " × ".join(f"{size:,}" for size in sizes),
            figure(part.flops / measured[part.name] / 1e9, 0),
            figure(part.flops / seconds / 1e9, 0),
        ]
        for (sizes, part), seconds in zip(products.items(), recorded["cpu_seconds"], strict=True)
    ]
    rows = [
        [
            part.name,
            figure(measured[part.name], 3),
            figure(part.flops / 1e9, 0) if part.flops else None,
            figure(part.flops / measured[part.name] / 1e9, 0) if part.flops else None,
        ]
        for part in parts
    ]
    facts = machine()
    print(
        f"{options.size}, {options.pairs} pairs, prompt {options.prompt}, responses "
        f"{options.response}, float32; {describe(facts)}, jax {jax.__version__}"
    )
    print(table(["part", "CPU-seconds", "GFLOP", "GFLOP a CPU-second"], rows))
    print()
    print(table(["product", "JAX", "PyTorch"], rates))
    best = max(part.flops / measured[part.name] for part in products.values())
    own = {part.name: part for part in parts}["whole step"]
    print(
        f"at the best rate of JAX's products, {best / 1e9:.0f} GFLOP a CPU-second, the step's own "
        f"products take {own.flops / best:.2f} CPU-seconds of {measured['whole step']:.2f}"
    )
    content = {"machine": facts, "options": {"size": options.size}, "cpu_seconds": measured}
    content["torch_cpu_seconds"] = recorded["cpu_seconds"]
    content["flops"] = {part.name: part.flops for part in (*parts, *products.values())}
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


def step_parts(
    options: Options, shape: inputs.Shape
) -> tuple[list[Part], dict[tuple[int, int, int], Part]]:
    """The parts of a step, and products of its shapes by themselves."""
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
    q, k, v = (jax.random.normal(key, (*rows, shape.heads, head)) for key in keys)
    states = jax.random.normal(keys[0], (responses, shape.width))
    targets = jnp.asarray(pairs.response_tokens).reshape(-1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    objective = PreferenceObjective(
        policy=Policy(config=config, remat="full"), loss=dpo, options={"beta": 0.1}
    )
    state = initial_state(params, optimizer, seed=0)

    def layers(params: Any, remat: str) -> jax.Array:
        return hidden_states(params, config, joint, layout, compute=Compute(remat=remat)).sum()

    def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, scale=config.scale, **seen).sum()

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
    shapes = (
        (tokens, shape.width, shape.mlp_width),
        (tokens, shape.mlp_width, shape.width),
        (512, shape.width, 2048),
        (responses, shape.width, inputs.VOCABULARY),
        (2048, 2048, 2048),
    )
    product = jax.jit(jnp.matmul)

    def by_itself(sizes: tuple[int, int, int]) -> Part:
        m, inner, n = sizes
        a, b = jax.random.normal(keys[0], (m, inner)), jax.random.normal(keys[1], (inner, n))
        return Part(f"product {sizes}", lambda: product(a, b), 2.0 * m * inner * n)

    return parts, {sizes: by_itself(sizes) for sizes in dict.fromkeys(shapes)}


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
