"""The cost of seeing every pair's gradients: time and memory of a training step, side by side.

Command:  python -m benchmarks.entanglement [--size 15M] [--length 256] [--pairs 4] [--rounds 7]
Time:     minutes on two CPU cores
Expect:   one table; "watched" at most 1.10 of "plain" in time and 1.05 in memory, "ledger" 2 to 2.6
          in time

In one process, in turn, round by round: the plain DPO step; the same step watched; the step with a
ledger (`entanglement.ledger`) of its batch; the step and, beside it, two backward passes per pair;
the step and a vmap of per-sequence gradients. The ratio of each round is taken within the round,
and its median is shown; memory is what the compiled program asks for: parameters, optimiser state,
reference and temporaries.
"""

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxalign.data import PairBatch
from jaxalign.entanglement import PairGeometry, two_pass_geometry
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models import DecoderConfig
from jaxalign.models.decoder import init_params
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.models.responses import response_log_probs
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.pair_probe import PairProbe
from jaxalign.training.step import initial_state, train_step

SHAPES = {  # width, layers, heads, MLP width: Llama-shaped
    "1M": (128, 4, 4, 344),
    "15M": (288, 6, 6, 768),
    "42M": (512, 8, 8, 1376),
    "110M": (768, 12, 12, 2048),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "42M", "110M"] = "15M"
    """Parameters of the model, with its 32,000 tokens tied."""
    length: int = 256
    """Tokens of prompt and response together; the second half is response."""
    pairs: int = 4
    """Pairs in a batch."""
    rounds: int = 7
    """Rounds after the first, which compiles."""
    reference: Literal["live", "precomputed"] = "live"
    """Whether the step runs the reference, too."""
    remat: Literal["none", "full", "dots"] = "none"
    """As in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """As in training."""
    vocabulary: int = 32_000
    """Tokens."""
    tied: bool = True
    """Whether embedding and unembedding are one matrix."""
    lora: int = 0
    """Rank of adapters on all matrices; 0: all parameters are trained."""
    ways: tuple[str, ...] = ("plain", "watched", "ledger", "two passes", "vmap")
    """What is compared with the first."""


def decoder_of(
    size: str, *, length: int, vocabulary: int = 32_000, tied: bool = True
) -> DecoderConfig:
    """A Llama-shaped decoder of a size in `SHAPES`."""
    width, layers, heads, mlp_width = SHAPES[size]
    return DecoderConfig(
        family="llama",
        vocab_size=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=mlp_width,
        context_length=length,
        tied=tied,
    )


def main(options: Options) -> None:
    """Measure and print."""
    config = decoder_of(
        options.size, length=options.length, vocabulary=options.vocabulary, tied=options.tied
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    batch = random_batch(options)
    adapters, policy = None, Policy(config=config, remat=options.remat, dtype=options.dtype)
    frozen = {"policy": None, "reference": params}
    if options.lora:
        adapters = init_adapters(params, jax.random.key(1), rank=options.lora, targets=["*"])
        policy = Policy(config=config, remat=options.remat, dtype=options.dtype, adapter_scale=1.0)
        frozen["policy"] = params
    objective = PreferenceObjective(
        policy=policy, loss=PREFERENCE_LOSSES["dpo"], options={"beta": 0.1}
    )
    optimizer = optax.adamw(1e-6)
    trained = jax.tree.map(jnp.copy, params) if adapters is None else adapters
    state = initial_state(trained, optimizer, seed=0)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer)
    watched = functools.partial(step, backward=PairProbe(objective=objective))

    def beside(geometry):
        def both(state, frozen, batch):
            own = (state.params, None) if adapters is None else (params, state.params)
            seen = geometry(own[0], config, batch.pairs, adapters=own[1], compute=policy.compute)
            return *step(state, frozen, batch), seen

        return both

    programs = {
        "plain": step,
        "watched": watched,
        "ledger": functools.partial(step, backward=PairProbe(objective=objective, ledger=True)),
        "two passes": beside(two_pass_geometry),
        "vmap": beside(vmapped_geometry),
    }
    count = sum(x.size for x in jax.tree.leaves(params))
    device = jax.devices()[0]
    print(
        f"{count:,} parameters, {options.pairs} pairs of 2 x {options.length} tokens, "
        f"{options.dtype}, reference {options.reference}, remat {options.remat}, "
        f"{'LoRA rank ' + str(options.lora) if options.lora else 'all parameters'}; "
        f"{device.device_kind}, jax {jax.__version__}"
    )
    compiled, memory = {}, {}
    for name in options.ways:
        jitted = jax.jit(programs[name], donate_argnums=0)
        compiled[name] = jitted.lower(state, frozen, batch).compile()
        memory[name] = peak(compiled[name].memory_analysis())
        state = run(compiled[name], state, frozen, batch)
    seconds = {name: [] for name in compiled}
    for _ in range(options.rounds):
        for name, program in compiled.items():
            start = time.perf_counter()
            state = run(program, state, frozen, batch)
            seconds[name].append(time.perf_counter() - start)
    first = options.ways[0]
    print(f"{'':12} {'seconds':>8} {'ratio':>7} {'spread':>13} {'memory MB':>10} {'ratio':>6}")
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds[first], strict=True))
        print(
            f"{name:12} {statistics.median(own):8.3f} {statistics.median(ratios):7.3f} "
            f"{ratios[0]:6.2f}-{ratios[-1]:6.2f} {memory[name] / 1e6:10.1f} "
            f"{memory[name] / memory[first]:6.2f}"
        )


def run(program, state, frozen, batch):
    """One step, waited for; the new state."""
    return jax.block_until_ready(program(state, frozen, batch))[0]


def peak(memory) -> int:
    """Bytes of arguments, results and temporaries together; what is donated counts once."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def random_batch(options: Options) -> ReferencedBatch:
    """Pairs of one prompt and two responses of random tokens, nothing padded."""
    rng = np.random.default_rng(0)
    response = options.length // 2
    tokens = rng.integers(1, options.vocabulary, (options.pairs, 2, options.length), np.int32)
    tokens[:, 1, :-response] = tokens[:, 0, :-response]
    sides = options.pairs, 2
    reference = None
    if options.reference == "precomputed":
        reference = jnp.full(sides, -10.0 * response)
    return ReferencedBatch(
        pairs=PairBatch(
            tokens=jnp.asarray(tokens),
            prompt_length=jnp.full(sides, options.length - response, jnp.int32),
            response_tokens=jnp.asarray(tokens[..., -response:]),
            response_length=jnp.full(sides, response, jnp.int32),
            record_index=jnp.arange(options.pairs),
            weight=jnp.ones(options.pairs),
        ),
        reference=reference,
    )


def vmapped_geometry(params, config, batch, *, adapters, compute) -> PairGeometry:
    """Every sequence's gradient at once, as `vmap(grad)` makes them."""

    def log_prob(trained, row):
        policy = trained if adapters is None else with_adapters(params, trained, 1.0)
        rows = jax.tree.map(lambda x: x[None], row)
        return response_log_probs(policy, config, rows, compute=compute).log_prob.sum()

    trained = params if adapters is None else adapters
    gradients = jax.vmap(jax.grad(log_prob), (None, 0))(trained, batch.rows())
    parts = jax.tree.map(
        lambda x: jnp.einsum("psi,pri->psr", *[x.reshape(len(batch.weight), 2, -1)] * 2),
        gradients,
    )
    gram = sum(jax.tree.leaves(parts))
    return PairGeometry(chosen=gram[:, 0, 0], rejected=gram[:, 1, 1], inner=gram[:, 0, 1])


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
