"""What it saves to compute a pair's prompt once: a DPO step with joint rows and with two rows.

Command:  python -m benchmarks.shared_prompts [--size 15M] [--prompt 384] [--response 64]
Time:     minutes on two CPU cores
Expect:   one table; at least 1.4 times the tokens/s at prompt 384, response 64; the same loss

In one process, in turn, round by round. Both steps compute the same loss and gradient (the table
shows by how much the updated parameters differ); tokens are those of both rows, prompts included.
"""

import dataclasses
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

from benchmarks.entanglement import decoder_of, peak
from jaxalign.data import PairBatch
from jaxalign.losses import PREFERENCE_LOSSES
from jaxalign.models.decoder import init_params
from jaxalign.training.objectives import Policy, PreferenceObjective, ReferencedBatch
from jaxalign.training.step import initial_state, train_step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "42M", "110M"] = "15M"
    """Parameters of the model, with its 32,000 tokens tied."""
    prompt: int = 384
    """Tokens of every prompt."""
    response: int = 64
    """Tokens of every response."""
    pairs: int = 4
    """Pairs in a batch."""
    rounds: int = 7
    """Rounds after the first, which compiles."""
    remat: Literal["none", "full", "dots"] = "none"
    """As in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """As in training."""


def main(options: Options) -> None:
    """Measure and print."""
    config = decoder_of(options.size, length=options.prompt + options.response)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    frozen = {"policy": None, "reference": params}
    objective = PreferenceObjective(
        policy=Policy(config=config, remat=options.remat, dtype=options.dtype),
        loss=PREFERENCE_LOSSES["dpo"],
        options={"beta": 0.1},
    )
    optimizer = optax.sgd(1e-3)
    step = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer))
    state = initial_state(params, optimizer, seed=0)
    joint = random_pairs(options)
    apart = dataclasses.replace(joint, joint_tokens=None, common_length=None)
    batches = {
        name: ReferencedBatch(pairs=pairs, reference=None)
        for name, pairs in (("two rows", apart), ("joint rows", joint))
    }
    compiled = {name: step.lower(state, frozen, b).compile() for name, b in batches.items()}
    after = {name: compiled[name](state, frozen, b)[0].params for name, b in batches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(options.rounds):
        for name, batch in batches.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](state, frozen, batch))
            seconds[name].append(time.perf_counter() - start)

    moved = [a - b for a, b in zip(*map(jax.tree.leaves, (after["two rows"], params)), strict=True)]
    apart_by = jax.tree.map(jnp.subtract, after["joint rows"], after["two rows"])
    error = float(optax.tree.norm(apart_by) / optax.tree.norm(moved))
    tokens = 2 * options.pairs * (options.prompt + options.response)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{count:,} parameters, {options.pairs} pairs, prompt {options.prompt}, responses "
        f"{options.response}, {options.dtype}, live reference; "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    print(f"{'':12} {'seconds':>8} {'tokens/s':>9} {'speed':>6} {'spread':>11} {'memory MB':>10}")
    for name, own in seconds.items():
        gains = sorted(a / b for a, b in zip(seconds["two rows"], own, strict=True))
        print(
            f"{name:12} {statistics.median(own):8.3f} {tokens / statistics.median(own):9,.0f} "
            f"{statistics.median(gains):6.2f} {gains[0]:5.2f}-{gains[-1]:5.2f} "
            f"{peak(compiled[name].memory_analysis()) / 1e6:10.1f}"
        )
    print(f"the updates differ by {error:.1e} of their norm")


def random_pairs(options: Options) -> PairBatch:
    """Pairs of one prompt and two responses of random tokens, nothing padded."""
    rng = np.random.default_rng(0)
    sizes = options.pairs, options.prompt
    prompt = np.repeat(rng.integers(1, 32_000, sizes, np.int32)[:, None], 2, axis=1)
    responses = rng.integers(1, 16_000, (options.pairs, 2, options.response), np.int32)
    responses[:, 1] += 16_000 - 1  # no token in common
    tokens = np.concatenate([prompt, responses], axis=2)
    full = np.full((options.pairs, 2), 1, np.int32)
    return PairBatch(
        tokens=tokens,
        prompt_length=options.prompt * full,
        response_tokens=responses,
        response_length=options.response * full,
        record_index=np.arange(options.pairs),
        weight=np.ones(options.pairs, np.float32),
        joint_tokens=np.concatenate([tokens[:, 0], responses[:, 1]], axis=1),
        common_length=np.full(options.pairs, options.prompt, np.int32),
    )


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
