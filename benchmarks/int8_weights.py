"""What int8 weights save and what they change: products, distributions and greedy answers.

Command:  python -m benchmarks.int8_weights --model FOLDER [--questions 12] [--new 64]
Time:     about three minutes on two CPU cores with 135M parameters
Expect:   two tables; products of few rows take less time, those of many rows as much as in float32

The first table has CPU-milliseconds of 30 products in a row, of the shape of the model's MLP, each
with a matrix of its own. The second compares the rounded model with the loaded one: both answer
chat questions greedily; the distributions of the next token are compared at every token of the
loaded model's answers.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.decode_step import cpu_seconds
from benchmarks.machine import describe, figure, machine, table, write_json
from benchmarks.sampling import questions
from jaxalign.generation import Sampling
from jaxalign.generation.continuous import compile_programs, sample_continuously
from jaxalign.generation.rows import Method, Source
from jaxalign.generation.weights import DecodingWeights, prepare
from jaxalign.models import DecoderConfig, decoder, int8, load_pretrained, products

MATRICES = 30


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared."""

    model: Path
    """Hugging Face folder of a chat model."""
    questions: int = 12
    """Number of chat prompts."""
    new: int = 64
    """Largest number of tokens in an answer."""
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Rows of the products."""
    repeats: int = 9
    """How often each product is on the clock; medians are shown."""
    json: Path | None = None
    """Where to write all that was measured."""


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How the rounded model differs from the loaded one."""

    mean_kl: float
    """Mean of KL(loaded || rounded) of the next token, in nats."""
    largest_kl: float
    same_token: float
    """Fraction of tokens at which both have the same most likely one."""
    same_answers: int
    """Number of greedy answers that are equal."""
    first_difference: float
    """Median number of tokens before two answers differ; the answer's length if they do not."""


def main(options: Options) -> None:
    """Measure and print."""
    facts, model = machine(), load_pretrained(str(options.model))
    print(f"{options.model.resolve().name}; {describe(facts)}")
    shape = model.config.width, model.config.mlp_width
    timings = [times(shape, rows, options.repeats) for rows in options.rows]
    lines = [
        [rows, figure(one["float32"]), figure(one["int8"]), figure(one["float32"] / one["int8"])]
        for rows, one in zip(options.rows, timings, strict=True)
    ]
    print(table(["rows", "float32, CPU-ms", "int8, CPU-ms", "float32 / int8"], lines))
    differences = compare(model.params, model.config, options)
    print()
    print(table(["measured", "value"], described(differences, options.questions)))
    products = [{"rows": rows} | one for rows, one in zip(options.rows, timings, strict=True)]
    content = {"machine": facts, "products": products, "differences": asdict(differences)}
    write_json(options.json, content)


def described(found: Differences, answers: int) -> list[list[str | None]]:
    """Lines of the second table."""
    return [
        ["KL of the next token, mean, nats", figure(found.mean_kl, 4)],
        ["KL of the next token, largest, nats", figure(found.largest_kl, 4)],
        ["same most likely token", f"{found.same_token:.1%}"],
        ["same greedy answer", f"{found.same_answers} of {answers}"],
        ["tokens before the first difference, median", figure(found.first_difference, 0)],
    ]


def times(shape: tuple[int, int], rows: int, repeats: int) -> dict[str, float]:
    """CPU-milliseconds of products with `MATRICES` matrices, in both formats."""
    drawn = np.random.default_rng(0)
    kernels = [jnp.asarray(drawn.normal(size=shape), jnp.float32) for _ in range(MATRICES)]
    x = jnp.asarray(drawn.normal(size=(rows, shape[0])), jnp.float32)

    def milliseconds(product: Callable[[Any, Any], jax.Array], matrices: list[Any]) -> float:
        def chain(x: jax.Array, matrices: list[Any]) -> jax.Array:
            """Each product needs all of the one before."""
            for matrix in matrices:
                x = x + 1e-9 * jnp.sum(product(x, matrix), axis=1, keepdims=True)
            return x

        run = jax.jit(chain)
        return 1e3 * cpu_seconds(lambda: run(x, matrices), repeats)

    rounded = [jax.jit(int8.quantise)(kernel) for kernel in kernels]
    return {
        "float32": milliseconds(products.product, kernels),
        "int8": milliseconds(int8.product, rounded),
    }


def compare(params: Any, config: DecoderConfig, options: Options) -> Differences:
    """The rounded model beside the loaded one."""
    prompts = questions(options.model, options.questions)
    rules = Sampling(max_tokens=options.new, temperature=0.0)
    method = Method(config=config, sampling=rules, dtype=jnp.float32)
    programs = compile_programs(method)

    def answers(weights: DecodingWeights) -> list[list[int]]:
        source = Source(policies=[weights], mixture=jnp.ones(1), key=jax.random.key(0), stops=None)
        numbers = [[at] for at in range(len(prompts))]
        found = {}
        given = programs, source, method, prompts, numbers
        for one in sample_continuously(*given, rows=4, padded=lambda n: 32 * -(-n // 32)):
            found[one.prompt] = one.tokens.tolist()
        return [found[at] for at in range(len(prompts))]

    @jax.jit
    def log_probs(weights: DecodingWeights, tokens: jax.Array) -> jax.Array:
        hidden = decoder.hidden_states(weights.params, config, tokens)
        logits = decoder.unembed(hidden, config, weights.kernel, weights.bias)
        return jax.nn.log_softmax(logits)[0]

    prepared = jax.jit(prepare, static_argnames=("config", "dtype", "in_int8"))
    loaded = prepared(params, config=config, dtype=jnp.float32)
    rounded = prepared(params, config=config, dtype=jnp.float32, in_int8=True)
    mine, own = answers(rounded), answers(loaded)
    kls, same = [], []
    longest = max(map(len, prompts)) + options.new
    for prompt, answer in zip(prompts, own, strict=True):
        whole = [*prompt, *answer]
        tokens = jnp.asarray([whole + [0] * (longest - len(whole))])
        p, q = (
            log_probs(one, tokens)[len(prompt) - 1 : len(whole) - 1] for one in (loaded, rounded)
        )
        kls += np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1)).tolist()
        same += np.asarray(jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).tolist()
    until = [
        next((at for at, (x, y) in enumerate(zip(*both, strict=True)) if x != y), len(both[0]))
        for both in zip(own, mine, strict=True)
    ]
    return Differences(
        mean_kl=float(np.mean(kls)),
        largest_kl=float(np.max(kls)),
        same_token=float(np.mean(same)),
        same_answers=sum(x == y for x, y in zip(own, mine, strict=True)),
        first_difference=float(np.median(until)),
    )


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
