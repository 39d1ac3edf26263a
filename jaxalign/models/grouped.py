r"""Products of rows, sorted by group, with a matrix for each group: one for each expert.

.. math:: y_i = x_i W_{g(i)}

Their gradients can be watched (`probes`): the gradient of one row of a batch is a matrix for each
group, and two rows have an inner product where both have tokens in a group.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.models import devices
from jaxalign.models.precision import precision
from jaxalign.models.probes import (
    Probe,
    by_groups,
    factored_gram,
    forms_gradients,
    gram,
    number_of_sides,
    side_pairs,
    token_products,
)

LARGEST_BLOCK = 128


class Groups(NamedTuple):
    """Which group each slot of a batch's rows is in.

    Attributes:
      slots: the group of every slot, row by row; the number of groups: it is in none here.
      order: slots sorted by group; those of no group are last.
      inverse: the place of each slot in the sorted order.
      owner: the group of each sorted slot.
      sizes: slots of each group.
    """

    slots: Int[Array, "rows slots"]
    order: Int[Array, " all"]
    inverse: Int[Array, " all"]
    owner: Int[Array, " all"]
    sizes: Int[Array, " groups"]


def groups_of(slots: Int[Array, "rows slots"], number: int) -> Groups:
    """The order that sorts slots by their group.

    Args:
      slots: the group of every slot; `number` for one that is in no group.
      number: of groups.
    """
    flat = slots.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    return Groups(
        slots=slots,
        order=order,
        inverse=jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype)),
        owner=flat[order],
        sizes=_sizes(flat, number),
    )


def _sizes(groups: Int[Array, " all"], number: int) -> Int[Array, " groups"]:
    return jnp.bincount(groups, length=number + 1)[:number].astype(jnp.int32)


def dense(
    x: Float[Array, "all inputs"],
    params: Mapping[str, Any],
    groups: Groups,
    *,
    bias_share: float = 1.0,
) -> Float[Array, "all outputs"]:
    """`layers.dense` with a matrix for each group.

    Args:
      x: one row per sorted slot.
      params: {"kernel": [groups, inputs, outputs], "bias"?, "adapter"?, "probe"?}, as in
        `layers.dense`, but each probe is its zeros alone (`unspanned`).
      groups: of the slots.
      bias_share: the part of the bias that is added, and of what its probe returns: less than 1
        where the results of several devices add up.
    """
    probe = params.get("probe")
    y = product(x, params["kernel"], groups, probe)
    if "bias" in params:
        of_bias = None if probe is None else probe * bias_share
        y = y + spread(params["bias"] * bias_share, groups, x.dtype, of_bias)
    if "adapter" in params:
        adapter = params["adapter"]
        probe = adapter.get("probe")
        update = product(product(x, adapter["a"], groups, probe), adapter["b"], groups, probe)
        y = y + update * adapter["scale"].astype(x.dtype)[groups.owner, None]
    return y


def unspanned(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with the zeros of each probe in its place.

    Raises:
      ValueError: a probe watches packed rows, which the products of groups cannot tell apart.
    """

    def zeros(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: zeros(value) for name, value in node.items()}
        if isinstance(node, Probe):
            if node.spans is not None:
                raise ValueError("experts cannot be watched in packed rows")
            return node.gram
        return node

    return zeros(params)


def product(
    x: Float[Array, "all inputs"],
    kernel: Float[Array, "groups inputs outputs"],
    groups: Groups,
    probe: Float[Array, "sets products"] | None = None,
) -> Float[Array, "all outputs"]:
    """Each row times its group's matrix; with a probe, the pairs' Gram matrices, too."""
    if probe is None:
        return _product(x, kernel.astype(x.dtype), groups.sizes)
    return _watched(x, kernel, probe, groups)


def _product(x: Array, kernel: Array, sizes: Array) -> Array:
    """The product in the dtype of its inputs; rows of no group give anything."""
    if devices.platform() != "cpu":
        return jax.lax.ragged_dot(x, kernel, sizes, precision=precision(x.dtype))
    # On a CPU `ragged_dot` multiplies every row with every matrix.
    blocks = _blocks(sizes, len(x))
    rows = jnp.take(x, blocks.rows, axis=0, mode="fill", fill_value=0)
    y = jnp.einsum("bri,bio->bro", rows, kernel[blocks.group], precision=precision(x.dtype))
    return jnp.take(y.reshape(-1, y.shape[-1]), blocks.place, axis=0)


class _Blocks(NamedTuple):
    """Sorted rows in blocks of one group each; a group's last block is filled up."""

    rows: Int[Array, "blocks size"]
    """Number of each row; the number of rows: a filler."""
    group: Int[Array, " blocks"]
    place: Int[Array, " all"]
    """Where each row is in the blocks."""


def _blocks(sizes: Int[Array, " groups"], rows: int) -> _Blocks:
    number = len(sizes)
    size = min(LARGEST_BLOCK, 1 << max(0, rows // number - 1).bit_length())
    count = rows // size + number
    starts = jnp.cumsum(sizes) - sizes
    used = -(-sizes // size)
    first = jnp.cumsum(used) - used  # block of each group
    ends = jnp.cumsum(used)
    group = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), number - 1)
    within = (jnp.arange(count) - first[group])[:, None] * size + jnp.arange(size)[None]
    real = (within >= 0) & (within < sizes[group][:, None])
    of_row = jnp.minimum(
        jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right"), number - 1
    )
    place = first[of_row] * size + jnp.arange(rows) - starts[of_row]
    return _Blocks(
        rows=jnp.where(real, starts[group][:, None] + within, rows),
        group=group,
        place=jnp.minimum(place, count * size - 1),
    )


def kernel_gradient(
    x: Float[Array, "all inputs"], dy: Float[Array, "all outputs"], sizes: Int[Array, " groups"]
) -> Float[Array, "groups inputs outputs"]:
    """The gradient of each group's matrix, summed over its rows and returned in float32."""
    at = precision(x.dtype)
    if devices.platform() != "cpu":
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        return jax.lax.ragged_dot_general(
            x, dy, sizes, numbers, precision=at, preferred_element_type=jnp.float32
        )
    blocks = _blocks(sizes, len(x))
    rows, back = (jnp.take(y, blocks.rows, axis=0, mode="fill", fill_value=0) for y in (x, dy))
    own = jnp.einsum("bri,bro->bio", rows, back, precision=at, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(own, blocks.group, num_segments=len(sizes))


def spread(
    vectors: Float[Array, "groups outputs"],
    groups: Groups,
    dtype: Any,
    probe: Float[Array, "sets products"] | None = None,
) -> Float[Array, "all outputs"]:
    """Each row's own vector, that of its group; with a probe, as `product`; 0 for no group."""
    if probe is None:
        return jnp.take(vectors.astype(dtype), groups.owner, axis=0, mode="fill", fill_value=0)
    return _watched_spread(dtype, vectors, probe, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched_spread(dtype: Any, vectors: Array, probe: Array, groups: Groups) -> Array:
    del probe
    return spread(vectors, groups, dtype)


def _watched_spread_forward(dtype, vectors, probe, groups):
    return spread(vectors, groups, dtype), (vectors, probe, groups)


def _watched_spread_backward(dtype, saved, dy):
    vectors, probe, groups = saved
    sides, dy = number_of_sides(probe), dy.astype(jnp.float32)
    sums = functools.partial(jax.ops.segment_sum, num_segments=len(vectors))
    total = sums(dy, groups.owner)
    slots = groups.slots.reshape(probe.shape[0], sides, -1)
    dys = by_groups(jnp.take(dy, groups.inverse, axis=0), probe)
    geometry = jax.lax.map(lambda rows: gram(*map(sums, *rows)), (dys, slots))
    return total.astype(vectors.dtype), geometry, None


_watched_spread.defvjp(_watched_spread_forward, _watched_spread_backward)


@jax.custom_vjp
def _watched(x: Array, kernel: Array, probe: Array, groups: Groups) -> Array:
    del probe
    return _product(x, kernel.astype(x.dtype), groups.sizes)


def _watched_forward(x, kernel, probe, groups):
    return _watched(x, kernel, probe, groups), (x, kernel, probe, groups)


def _watched_backward(saved, dy):
    x, kernel, probe, groups = saved
    sides = number_of_sides(probe)
    dx = _product(dy, jnp.swapaxes(kernel, 1, 2).astype(dy.dtype), groups.sizes)
    total = kernel_gradient(x, dy, groups.sizes)
    slots = groups.slots.reshape(probe.shape[0], sides, -1)
    xs, dys = (by_groups(jnp.take(y, groups.inverse, axis=0), probe) for y in (x, dy))
    number, inputs, outputs = kernel.shape
    forms = forms_gradients(slots.shape[-1], inputs, outputs, sides, number)
    of_sides = functools.partial(_formed_gram if forms else _factored_gram, number)
    geometry = jax.lax.map(lambda rows: of_sides(*rows), (xs, dys, slots))
    return dx, total.astype(kernel.dtype), geometry, None


_watched.defvjp(_watched_forward, _watched_backward)


def _factored_gram(number: int, x: Array, dy: Array, slots: Array) -> Float[Array, " products"]:
    """The Gram matrix of some rows from inner products of slots of the same group."""
    first, second = (slots[sides] for sides in side_pairs(len(slots)))
    same = (first[:, :, None] == second[:, None, :]) & (first < number)[:, :, None]
    return factored_gram(token_products(x) * same, token_products(dy))


def _formed_gram(number: int, x: Array, dy: Array, slots: Array) -> Float[Array, " products"]:
    """The Gram matrix of some rows from their gradients."""

    def gradient(side: int) -> Array:
        order = jnp.argsort(slots[side], stable=True)
        return kernel_gradient(x[side][order], dy[side][order], _sizes(slots[side], number))

    return gram(*map(gradient, range(len(slots)))).sum(0)
