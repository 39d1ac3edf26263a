"""What `--remat auto` decides by: the bytes that a stage's step keeps on a device."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from jaxalign.commands.planning.batches import largest_batch
from jaxalign.commands.updates import make_objective, make_policy
from jaxalign.config import TrainConfig
from jaxalign.training.memory import choose, saved_bytes
from jaxalign.training.planning import bytes_on_device, placed_parameters
from jaxalign.training.step import TrainState


def choose_remat(
    config: TrainConfig,
    name: str,
    model_config: Any,
    state: TrainState,
    frozen: dict[str, Any],
    mesh: Mesh,
    *,
    platform: str,
    free: int | None,
) -> tuple[str, float]:
    """The fastest way to rematerialise a stage that fits, and its bytes of activations.

    Args:
      config: of the run.
      name: the stage's.
      model_config: the architecture.
      state: shapes of the stage's state.
      frozen: shapes of what its step reads and never changes.
      mesh: how devices share the work.
      platform: that the step is for.
      free: bytes that are free on a device beside the parameters; None: not known.
    """

    def saved(remat: str) -> int:
        how = dataclasses.replace(config, remat=remat)
        objective = make_objective(how, name, make_policy(how, name, model_config))
        batch, _ = largest_batch(how, name, objective, platform=platform)
        parts = getattr(how, name).micro_batches
        if name == "online":
            parts *= objective.algorithm.minibatches
        return saved_bytes(objective, state.params, frozen, batch, micro_batches=parts)

    def activations(remat: str) -> float:
        """Bytes on a device that a step keeps, and that a layer needs in its backward pass."""
        kept: float = saved(remat)
        if remat != "none":  # a layer at a time is recomputed whole
            layers = getattr(model_config, "layers", None) or model_config.decoder_layers
            kept += max(saved("none") - kept, 0) / layers
        return kept / (mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"])

    return choose(activations, _other_bytes(state, frozen, mesh), free, platform=platform)


def _other_bytes(state: TrainState, frozen: dict[str, Any], mesh: Mesh) -> int:
    """Bytes on a device that a stage will take beside its parameters and activations.

    Gradients, updates, the optimiser's state, and a reference of its own.
    """
    trained, moments, reference = (
        bytes_on_device(placed_parameters(tree, mesh))
        for tree in (state.params, state.opt_state, frozen["reference"])
    )
    return 2 * trained + moments + reference
