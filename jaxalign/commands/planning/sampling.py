"""What the online stage's sampling takes of a chip, between two updates."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.commands.online import sampling_rules
from jaxalign.commands.updates import algorithm_of
from jaxalign.config import TrainConfig
from jaxalign.generation import compile_generate
from jaxalign.online.sampler import draws_of
from jaxalign.online.step import policies_of
from jaxalign.sharding import make_mesh
from jaxalign.training.objectives import Policy
from jaxalign.training.planning import Structs, placed_batch, placed_parameters, program_memory
from jaxalign.training.step import TrainState

Policies = dict[str, Any]


def sampling_policies(
    config: TrainConfig,
    policy: Policy,
    state: TrainState,
    frozen: Mapping[str, Structs],
    mesh: Mesh,
) -> tuple[Policies, Mesh]:
    """The policies that may sample, as shapes where sampling wants them, and its mesh.

    Args:
      config: of the run.
      policy: of the online stage.
      state: placed shapes.
      frozen: placed shapes.
      mesh: of the updates; sampling has the same devices.
    """
    policies, wanted = policies_of(policy, state, frozen), config.rollout.mesh
    if not wanted:
        return policies, mesh
    own = make_mesh(**wanted, devices=mesh.devices.flatten())
    return {name: placed_parameters(one, own) for name, one in policies.items()}, own


def sampling_memory(
    config: TrainConfig, policy: Policy, policies: Policies, mesh: Mesh
) -> dict[str, int]:
    """Compile all draws of a rollout and read what the largest one takes, on one device.

    Returns:
      Bytes of "temporaries" (caches and what a step of decoding makes) and of the "program".

    Raises:
      TooLargeError: the compiler says that it does not fit.
    """
    prompts, length = config.online.batch_size, config.rollout.max_prompt_length
    batch = placed_batch(
        jax.eval_shape(
            lambda: (jnp.zeros((prompts, length), jnp.int32), jnp.zeros(prompts, jnp.int32))
        ),
        mesh,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    rules = sampling_rules(config, ends=[0])
    found = []
    for draw, samples in draws_of(algorithm_of(config)):
        if not draw.weights:  # the responses of the data
            continue
        program = compile_generate(
            policy.config, mesh, samples=samples, sampling=rules, dtype=policy.dtype
        )
        mixed = [policies[name] for name in draw.weights]
        weights = jax.ShapeDtypeStruct((len(mixed),), jnp.float32)
        found.append(program_memory(program, mesh, mixed, *batch, key, weights, 0))
    return max(found, key=lambda memory: sum(memory.values()))
