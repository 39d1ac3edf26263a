"""What a fused kernel of log-probs could save on a TPU, by its compiler's cost model.

Command:  python -m benchmarks.head [--chips v5p v5e] [--tokens 8192] [--vocabulary 131072]
Time:     a minute on two CPU cores; needs pip install 'jaxalign[tpu]', not a TPU
Expect:   one table (benchmarks/README.md shows it)

Log-probs of tokens and their gradients, bfloat16, on one chip, as `token_log_probs` computes them:
blocks of the vocabulary in turn, each block's logits in memory. "Products": the matrix products
that are needed (one forward; one again and two more backward) at the chip's data sheet.
"Compiler": the seconds of the compiler's own cost model. A kernel that keeps logits on the chip
saves at most what lies between the two, if it reaches the full rate of the matrix units. One that
forms the two gradients in passes of their own has five products instead of four.
"""

import itertools
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

from jaxalign.models import devices
from jaxalign.models.logprobs import BLOCKS, token_log_probs
from jaxalign.planning.topologies import CHIPS, slice_devices

SMALLEST = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compiled."""

    chips: tuple[str, ...] = ("v5p", "v5e")
    """Generations of TPUs."""
    widths: tuple[int, ...] = (576, 2048, 4096)
    """Widths of hidden states: SmolLM2-135M, Llama 3 1B and 8B."""
    tokens: int = 8192
    """Response tokens on a chip."""
    vocabulary: int = 131072
    """Columns of the head; a multiple of a block's."""
    logits: tuple[int, ...] = (2**24, 2**25, BLOCKS["tpu"][1])
    """Logits in a block; the last: what is used."""


def main(options: Options) -> None:
    """Compile each shape and print its row."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print("| chip | width | logits of a block | products, ms | compiler, ms | kernel saves up to |")
    print("|---|---:|---:|---:|---:|---:|")
    for chip, width, logits in itertools.product(options.chips, options.widths, options.logits):
        products = 4 * 2 * options.tokens * width * options.vocabulary / CHIPS[chip].flops
        columns = logits // options.tokens
        seconds = compiled(chip, options.tokens, width, options.vocabulary, columns)
        print(
            f"| {chip} | {width:,} | {logits:,} | {1e3 * products:.1f} | {1e3 * seconds:.1f} "
            f"| {1 - products / seconds:.0%} |",
            flush=True,
        )


def compiled(chip: str, tokens: int, width: int, vocabulary: int, columns: int) -> float:
    """Seconds of the compiler's cost model for log-probs and gradients.

    It counts a loop's body once. Programs of one and of two vocabularies have the same body, and
    everything outside of it is proportional to the vocabulary: two equations for the two.

    Args:
      chip: a TPU generation.
      tokens: rows of the head.
      width: of hidden states.
      vocabulary: columns of the head.
      columns: of a block.

    Raises:
      ValueError: the vocabulary is not a multiple of a block's columns.
    """
    trips, rest = divmod(vocabulary, columns)
    if rest:
        raise ValueError(f"--vocabulary {vocabulary}: not a multiple of {columns}")
    once, twice = (cost(chip, tokens, width, n * vocabulary, columns) for n in (1, 2))
    outside = twice - once
    return trips * (once - outside) + outside


def cost(chip: str, tokens: int, width: int, vocabulary: int, columns: int) -> float:
    """The compiler's seconds, with one pass through each loop's body."""
    at = SingleDeviceSharding(slice_devices(SMALLEST[chip])[0][0])

    def total(hidden, kernel, targets):
        return token_log_probs(hidden, kernel, targets, vocab_block=columns).log_prob.sum()

    shapes = ((tokens, width), jnp.bfloat16), ((width, vocabulary), jnp.bfloat16)
    arrays = [jax.ShapeDtypeStruct(*of, sharding=at) for of in (*shapes, ((tokens,), jnp.int32))]
    with devices.compiling_for("tpu", 1):
        program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arrays).compile()
    return program.cost_analysis()["optimal_seconds"]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
