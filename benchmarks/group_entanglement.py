"""The cost of seeing what the responses to a prompt do to each other: time and memory of an update.

Command:  python -m benchmarks.group_entanglement [--size 15M] [--length 128] [--prompts 2]
          [--samples 4] [--rounds 5]
Time:     minutes on two CPU cores
Expect:   one table; "watched" 2 to 3 times "plain" in time, "one by one" more

In one process, in turn, round by round: the plain update of Dr. GRPO; the same update watched
(`online.entanglement.every 1`); the update and, beside it, both gradients of every response by a
backward pass of its own, and their inner products. Sampling, which takes most of an online step,
is left out. The ratio of each round is taken within the round, and its median is shown.
"""

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.entanglement import decoder_of, peak, run
from jaxalign.data import PairBatch
from jaxalign.entanglement import GroupGeometry
from jaxalign.models.decoder import init_params
from jaxalign.models.responses import response_log_probs
from jaxalign.online import ALGORITHMS, OnlineObjective, RolloutBatch
from jaxalign.online.group_probe import GroupProbe
from jaxalign.training.objectives import Policy
from jaxalign.training.step import initial_state, train_step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    size: Literal["1M", "15M", "42M", "110M"] = "15M"
    """Parameters of the model, with its tokens tied."""
    length: int = 128
    """Tokens of prompt and response together; the second half is response."""
    prompts: int = 2
    """Prompts in a batch."""
    samples: int = 4
    """Responses to each prompt."""
    rounds: int = 5
    """Rounds after the first, which compiles."""
    vocabulary: int = 32_000
    """Tokens."""


def main(options: Options) -> None:
    """Measure and print."""
    config = decoder_of(options.size, length=options.length, vocabulary=options.vocabulary)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    batch, frozen = random_rollout(options), {"policy": None, "reference": params}
    algorithm = ALGORITHMS["dr_grpo"](samples=options.samples)
    objective: Any = OnlineObjective(policy=Policy(config=config), algorithm=algorithm)
    optimizer = optax.sgd(1e-6)
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, seed=0)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer)

    def beside(state, frozen, batch):
        seen = one_by_one(state.params, config, batch, batch.reward - 0.5)
        return *step(state, frozen, batch), seen

    programs = {
        "plain": step,
        "watched": functools.partial(step, backward=GroupProbe(objective=objective)),
        "one by one": beside,
    }
    compiled, memory = {}, {}
    for name, program in programs.items():
        compiled[name] = jax.jit(program, donate_argnums=0).lower(state, frozen, batch).compile()
        memory[name] = peak(compiled[name].memory_analysis())
        state = run(compiled[name], state, frozen, batch)
    # CPU seconds where there are some: other programs do not count.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = {name: [] for name in compiled}
    for _ in range(options.rounds):
        for name, program in compiled.items():
            start = clock()
            state = run(program, state, frozen, batch)
            seconds[name].append(clock() - start)
    print(
        f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, {options.prompts} prompts "
        f"of {options.samples} x {options.length} tokens; {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}"
    )
    print(f"{'':12} {'seconds':>8} {'ratio':>7} {'spread':>13} {'memory MB':>10} {'ratio':>6}")
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds["plain"], strict=True))
        print(
            f"{name:12} {statistics.median(own):8.3f} {statistics.median(ratios):7.3f} "
            f"{ratios[0]:6.2f}-{ratios[-1]:6.2f} {memory[name] / 1e6:10.1f} "
            f"{memory[name] / memory['plain']:6.2f}"
        )


def random_rollout(options: Options) -> RolloutBatch:
    """Responses of random tokens, nothing padded; half of each group's have a reward."""
    rng = np.random.default_rng(0)
    response, shape = options.length // 2, (options.prompts, options.samples)
    tokens = rng.integers(1, options.vocabulary, (*shape, options.length), np.int32)
    tokens[:, 1:, :-response] = tokens[:, :1, :-response]
    return RolloutBatch(
        responses=PairBatch(
            tokens=jnp.asarray(tokens),
            prompt_length=jnp.full(shape, options.length - response, jnp.int32),
            response_tokens=jnp.asarray(tokens[..., -response:]),
            response_length=jnp.full(shape, response, jnp.int32),
            record_index=jnp.arange(options.prompts),
            weight=jnp.ones(options.prompts),
        ),
        preference=jnp.zeros((*shape, options.samples)),
        reward=jnp.tile(jnp.arange(options.samples) % 2.0, (options.prompts, 1)),
        baseline=jnp.zeros(shape),
        sampled_log_prob=None,
    )


def one_by_one(params: Any, config: Any, batch: RolloutBatch, advantage: Any) -> GroupGeometry:
    """Both gradients of every response by a backward pass each, prompt by prompt."""

    def of_prompt(inputs: Any) -> GroupGeometry:
        group, advantage = inputs
        rows = jax.tree.map(lambda x: x[None], group).rows()

        def log_probs(params: Any) -> Any:
            found = response_log_probs(params, config, rows).log_prob
            return jnp.concatenate([found.sum(-1), advantage * found.sum(-1)])

        _, backward = jax.vjp(log_probs, params)
        own = jax.lax.map(lambda cotangent: backward(cotangent)[0], jnp.eye(2 * len(advantage)))
        flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(own)]
        whole = sum((x @ x.T for x in flat), jnp.zeros(()))
        half = len(advantage)
        return GroupGeometry(gradients=whole[:half, :half], effects=whole[:half, half:])

    return jax.lax.map(of_prompt, (batch.responses, advantage))


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
