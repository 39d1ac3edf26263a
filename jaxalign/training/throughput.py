"""Model FLOPs of an update and peak FLOP/s of the devices."""

from typing import Any

import jax

PEAK_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 FLOP/s of one device, from the makers' data sheets."""


def active_fraction(model_config: Any) -> float:
    """The fraction of the experts of a mixture that a token is sent to; 1 without experts."""
    experts = getattr(model_config, "experts", None)
    return 1.0 if experts is None else experts.active / experts.number


def matrix_parameters(params: Any, *, active: float = 1.0) -> int:
    """Number of parameters in matrix products with each token: kernels, and a tied embedding.

    Args:
      params: of the model.
      active: fraction of the experts that a token is sent to (`active_fraction`); 1: all.
    """
    kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [getattr(key, "key", None) for key in path]
        if names[-1] == "kernel":
            kernels += round(leaf.size * active) if "experts" in names else leaf.size
    tied = "embed" in params and not {"unembed", "score"} & set(params)
    return kernels + (params["embed"]["embedding"].size if tied else 0)


def flops_per_token(
    params: Any, *, live_reference: bool, adapters: bool = False, active: float = 1.0
) -> float:
    """Model FLOPs of one update per token, without attention's own products.

    Forward 2, backward 4 (2 where only adapters are trained: no weight gradients), and 2 for a
    reference computed in the step, per matrix parameter, of experts per active one; recomputation
    does not count (the definition of model FLOP utilisation, arXiv:2204.02311, appendix B).
    """
    passes = 2 + (2 if adapters else 4) + (2 if live_reference else 0)
    return float(passes * matrix_parameters(params, active=active))


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices by the data sheet; None: unknown, as on a CPU.

    A measured rate is not used: it depends on the load of the machine.
    """
    devices = jax.devices()
    peak = PEAK_BFLOAT16.get(devices[0].device_kind)
    return None if peak is None else peak * len(devices)
