r"""A mixture of experts: each token is sent to a few of a layer's MLPs.

.. math:: y = \sum_{e \in \mathrm{top}_k(p)} w_e \, \mathrm{MLP}_e(x), \qquad
          p = \mathrm{softmax}(x W_r)

The weights :math:`w_e` are :math:`p_e`, in some families divided by their sum over the token's
experts. No token is dropped: rows of tokens are sorted by expert, and each expert multiplies its
own rows, however many (`grouped`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models import devices, grouped
from jaxalign.models.config import DecoderConfig, Experts
from jaxalign.models.layers import ACTIVATIONS, activated, clamped_swiglu, dense

BALANCE = "balance"
"""Key of the balance's probe beside the router's kernel (`with_balance`)."""
STATISTICS = ("balance_loss", "entropy", "load")
"""What a balance's probe returns of each layer."""


def expert_shapes(config: DecoderConfig, experts: Experts) -> dict[str, Any]:
    """The shapes of the router's and the experts' matrices, in the nested dict's own form."""
    lead = config.layers, experts.number

    def matrix(*lead: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        kernel = {"kernel": (*lead, inputs, outputs)}
        return kernel | ({"bias": (*lead, outputs)} if experts.bias else {})

    inner = matrix(*lead, inputs=config.width, outputs=experts.width)
    matrices = {"up": inner, "down": matrix(*lead, inputs=experts.width, outputs=config.width)}
    if config.gated:
        matrices["gate"] = inner
    router = matrix(config.layers, inputs=config.width, outputs=experts.number)
    return {"router": router, "experts": matrices}


def experts_branch(
    x: Float[Array, "rows length width"],
    layer: Mapping[str, Any],
    config: DecoderConfig,
    *,
    real: Bool[Array, "rows length"] | None = None,
) -> Float[Array, "rows length width"]:
    """What a layer's experts add to the residual stream.

    Args:
      x: what they read.
      layer: its parameters, with "router" and "experts".
      config: the decoder.
      real: the tokens that count in the statistics of the balance; None: all.
    """
    assert config.experts is not None
    weights, chosen = route(x, layer["router"], config.experts, real)
    clamped = config.experts.clamped
    plain = functools.partial(activated, ACTIVATIONS[config.activation])
    activate = plain if clamped is None else functools.partial(clamped_swiglu, clamped)
    mix = functools.partial(_mixed, activate=activate)
    return _over_devices(mix, x, weights, chosen, grouped.unspanned(layer["experts"]))


def route(
    x: Float[Array, "rows length width"],
    router: Mapping[str, Any],
    experts: Experts,
    real: Bool[Array, "rows length"] | None,
) -> tuple[Float[Array, "rows length active"], Int[Array, "rows length active"]]:
    """Each token's experts and their weights, in float32.

    Args:
      x: the tokens.
      router: {"kernel": [width, experts], "bias"?, ...} as in `layers.dense`, and the balance's
        probe where there is one (`with_balance`).
      experts: of the config.
      real: as in `experts_branch`.
    """
    probabilities = jax.nn.softmax(dense(x.astype(jnp.float32), router), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts.active)
    if BALANCE in router:
        if real is None:
            real = jnp.ones(x.shape[:2], bool)
        probabilities = _balanced(probabilities, router[BALANCE], chosen, real)
        weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
    if experts.renormalised:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights, chosen


def balance_loss(
    probabilities: Float[Array, "rows length experts"],
    chosen: Int[Array, "rows length active"],
    real: Bool[Array, "rows length"],
) -> Float[Array, ""]:
    r"""The load-balancing loss of a layer; k, the number of active experts, at perfect balance.

    .. math:: L = E \sum_e f_e P_e, \qquad
              f_e = \tfrac{1}{n} \sum_t [e \in \mathrm{top}_k(p_t)], \qquad
              P_e = \tfrac{1}{n} \sum_t p_{te}

    over the n real tokens of all rows, on all devices (arXiv:2101.03961, equations 4 to 6, for
    several active experts as in transformers' `load_balancing_loss_func`). transformers sums f and
    P over the layers before it multiplies them, which hides experts that are idle in one layer and
    busy in another; this is each layer's own.

    Args:
      probabilities: of the router.
      chosen: each token's experts.
      real: the tokens that count.
    """
    assigned, mean = _shares(probabilities, chosen, real)
    return probabilities.shape[-1] * jnp.sum(assigned * mean)


def _shares(probabilities: Array, chosen: Array, real: Array) -> tuple[Array, Array]:
    """F and P of `balance_loss`: no gradient flows through f, which is a count."""
    counted = real[..., None].astype(jnp.float32)
    number = jnp.maximum(counted.sum(), 1.0)
    hits = jax.nn.one_hot(chosen, probabilities.shape[-1], dtype=jnp.float32).sum(-2)
    assigned = jax.lax.stop_gradient((hits * counted).sum((0, 1)) / number)
    return assigned, (probabilities * counted).sum((0, 1)) / number


@jax.custom_vjp
def _balanced(probabilities: Array, probe: Array, chosen: Array, real: Array) -> Array:
    """The probabilities; their cotangents get those of the balance loss, times `probe[0]`.

    The probe's own cotangent are the `STATISTICS`.
    """
    del probe, chosen, real
    return probabilities


def _balanced_forward(probabilities, probe, chosen, real):
    return probabilities, (probabilities, probe, chosen, real)


def _balanced_backward(saved, cotangents):
    probabilities, probe, chosen, real = saved
    loss, slope = jax.value_and_grad(balance_loss)(probabilities, chosen, real)
    assigned, _ = _shares(probabilities, chosen, real)
    logs = jnp.log(jnp.maximum(probabilities, jnp.finfo(jnp.float32).tiny))
    entropy = -jnp.sum(probabilities * logs, axis=-1)
    entropy = jnp.sum(entropy * real) / jnp.maximum(real.sum(), 1)
    return cotangents + probe[0] * slope, jnp.stack([loss, entropy, assigned.max()]), None, None


_balanced.defvjp(_balanced_forward, _balanced_backward)


def balance_probe(config: Any, weight: float) -> Float[Array, "layers 3"] | None:
    """The probe of `with_balance` for a loss that is the mean over the layers, times a weight.

    None: the model has no experts.
    """
    if getattr(config, "experts", None) is None:
        return None
    return jnp.full((config.layers, len(STATISTICS)), weight / config.layers)


def with_balance(
    params: Mapping[str, Any], probe: Float[Array, "layers 3"] | None
) -> dict[str, Any]:
    """Parameters whose backward pass adds the gradient of the load-balancing loss.

    The forward pass is the same. The probe's cotangent are the `STATISTICS` of each layer: the
    loss, the entropy of the router's probabilities in nats, and the fraction of the tokens that are
    sent to the busiest expert.

    Args:
      params: a decoder's parameters.
      probe: of `balance_probe`; None: the parameters as they are.
    """
    if probe is None:
        return dict(params)
    layers = params["layers"]
    router = {**layers["router"], BALANCE: probe}
    return {**params, "layers": {**layers, "router": router}}


def _mixed(
    x: Array,
    weights: Array,
    chosen: Array,
    matrices: Mapping[str, Any],
    *,
    activate: Callable[..., Array],
    first: Array | None = None,
    parts: int = 1,
) -> Array:
    """The weighted sum of the experts' outputs; those from `first` on where not all are here.

    Where each of several `parts` has some of an expert's inner width, their results add up, and so
    each adds its part of the last bias.
    """
    rows, length, active = chosen.shape
    number = matrices["up"]["kernel"].shape[0]
    slots = chosen.reshape(rows, -1)
    if first is not None:
        slots = slots - first
        slots = jnp.where((slots >= 0) & (slots < number), slots, number)
    groups = grouped.groups_of(slots, number)
    tokens = jnp.take(x.reshape(-1, x.shape[-1]), groups.order // active, axis=0)
    # What a grouped product gives for rows of no group is not said.
    here = (groups.owner < number)[:, None]
    if first is not None:
        tokens = jnp.where(here, tokens, 0)
    up = grouped.dense(tokens, matrices["up"], groups)
    gate = grouped.dense(tokens, matrices["gate"], groups) if "gate" in matrices else None
    y = grouped.dense(activate(up, gate), matrices["down"], groups, bias_share=1 / parts)
    if first is not None:
        y = jnp.where(here, y, 0)
    y = jnp.take(y, groups.inverse, axis=0).reshape(rows, length, active, -1)
    return jnp.sum(y * weights.astype(y.dtype)[..., None], axis=2)


def _over_devices(mix: Any, x: Array, weights: Array, chosen: Array, matrices: Any) -> Array:
    """`mix` on each device for its own rows and experts.

    Rows are gathered over the devices that share the experts, and each device returns the sum over
    its experts; the sums are added and scattered back.
    """
    states = devices.state_sharding()
    if states is None or states.mesh.size == 1:
        return mix(x, weights, chosen, matrices)
    mesh, number = states.mesh, matrices["up"]["kernel"].shape[0]
    adapted = any("adapter" in matrix for matrix in matrices.values())
    probes = [probe for matrix in matrices.values() for probe in _probes(matrix)]
    size = lambda name: mesh.shape.get(name, 1)  # noqa: E731
    expert = "expert" if size("expert") > 1 and number % size("expert") == 0 else None
    tensor = None
    if size("tensor") > 1 and not adapted:
        inner = matrices["up"]["kernel"].shape[-1]
        tensor = "tensor" if inner % size("tensor") == 0 else None
    parts = devices.parts(states, 0)
    divides = all(len(split) % parts == 0 for split in (x, *probes))
    rows = states.spec[0] if divides else None
    whole = probes or x.shape[1] % devices.parts(states, 1)
    length = None if whole else states.spec[1]
    gathered = rows is not None and expert is not None
    split = {*(rows or ()), expert, tensor, *(() if whole else ("sequence",))}
    # Devices that repeat each other's work get equal shares of a cotangent. Their squares have to
    # add up to the square of the whole.
    copies = math.prod(count for name, count in mesh.shape.items() if name not in split)

    def spec_of(path: Any, leaf: Array) -> P:
        names = [key.key for key in path]
        if names[-1] == "probe":
            return P(rows)
        if names[-1] == "kernel" and tensor is not None:
            split = (tensor, None) if names[0] == "down" else (None, tensor)
            return P(expert, *split)
        if names[-1] == "bias" and names[0] != "down":
            return P(expert, tensor)
        return P(expert)

    of_rows = P(rows, length)
    specs = jax.tree_util.tree_map_with_path(spec_of, matrices)

    def on_device(x: Array, weights: Array, chosen: Array, matrices: Any) -> Array:
        matrices = _on_probes(lambda probe: copies * probe, matrices)
        if gathered:
            gather = functools.partial(jax.lax.all_gather, axis_name=expert, axis=0, tiled=True)
            x, weights, chosen = gather(x), gather(weights), gather(chosen)
            matrices = _on_probes(gather, matrices)
        first = None
        if expert is not None:
            first = jax.lax.axis_index(expert) * (number // size(expert))
        parts = 1 if tensor is None else size(tensor)
        y = mix(x, weights, chosen, matrices, first=first, parts=parts)
        if tensor is not None:
            y = jax.lax.psum(y, tensor)
        if gathered:
            return jax.lax.psum_scatter(y, expert, scatter_dimension=0, tiled=True)
        return y if expert is None else jax.lax.psum(y, expert)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_rows, of_rows, of_rows, specs),
        out_specs=of_rows,
        check_vma=False,
    )(x, weights, chosen, matrices)


def _on_probes(change: Callable[[Array], Array], matrices: Any) -> Any:
    """The matrices, their probes changed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(leaf) if path[-1].key == "probe" else leaf, matrices
    )


def _probes(matrix: Mapping[str, Any]) -> list[Array]:
    """The probes of a matrix and of its adapter."""
    nodes = matrix, matrix.get("adapter", {})
    return [node["probe"] for node in nodes if "probe" in node]
