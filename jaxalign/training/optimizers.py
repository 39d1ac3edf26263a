"""Optax optimisers and learning-rate schedules from plain arguments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adafactor", "lion", "rmsprop", "sgd")


def make_schedule(
    *,
    learning_rate: float,
    steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up, then constant, or linear or cosine decay to a fraction of the peak.

    Args:
      learning_rate: the peak.
      steps: number of updates, including warm-up.
      schedule: one of constant, linear, cosine.
      warmup_steps: number of updates over which the rate rises from 0.
      final_fraction: the last rate as a fraction of the peak (linear and cosine).
    """
    decay_steps = max(steps - warmup_steps, 1)
    match schedule:
        case "constant":
            after = optax.constant_schedule(learning_rate)
        case "linear":
            after = optax.linear_schedule(
                learning_rate, learning_rate * final_fraction, decay_steps
            )
        case "cosine":
            after = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=final_fraction)
        case _:
            raise UserError(f"schedule: {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def decays(params: Any) -> Any:
    """True for matrices (kernels, embeddings, adapters); norms and biases are not decayed."""
    matrices = ("kernel", "embedding", "a", "b")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in matrices, params
    )


def with_rule(
    name: str, learning_rate: float, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adam with its own learning rate for the parameters under one top-level name."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == name, params)

    return optax.partition({True: optax.adam(learning_rate), False: others}, labels)


class AverageState(NamedTuple):
    """State of `with_average`."""

    others: Any
    average: Any


def with_average(
    decay: float, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    r"""An unchanged update rule that also keeps a running average of the parameters.

    .. math:: \bar\theta \leftarrow d \, \bar\theta + (1 - d) \, \theta

    Args:
      decay: d in [0, 1]; 1 keeps the first parameters.
      others: the update rule.
    """
    if not 0 <= decay <= 1:
        raise UserError(f"decay: {decay} is not in [0, 1]")

    def init(params: Any) -> AverageState:
        return AverageState(others=others.init(params), average=jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        updates, inner = others.update(updates, state.others, params)
        moved = optax.apply_updates(params, updates)
        average = optax.incremental_update(moved, state.average, 1.0 - decay)
        return updates, AverageState(others=inner, average=average)

    return optax.GradientTransformation(init, update)


class IterationState(NamedTuple):
    """State of `with_iterations`."""

    others: Any
    previous: Any
    updates: Any


def with_iterations(
    length: int, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An unchanged update rule that also keeps the parameters of the start of each iteration.

    Args:
      length: number of updates in an iteration, >= 1.
      others: the update rule.
    """
    if length < 1:
        raise UserError(f"iteration: {length} is not positive")

    def init(params: Any) -> IterationState:
        previous = jax.tree.map(jnp.copy, params)
        return IterationState(others=others.init(params), previous=previous, updates=jnp.int32(0))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, IterationState]:
        updates, inner = others.update(updates, state.others, params)
        moved, done = optax.apply_updates(params, updates), state.updates + 1
        previous = jax.tree.map(
            lambda new, old: jnp.where(done % length == 0, new, old), moved, state.previous
        )
        return updates, IterationState(others=inner, previous=previous, updates=done)

    return optax.GradientTransformation(init, update)


class HistoryState(NamedTuple):
    """State of `with_past_policies`.

    Attributes:
      others: state of the update rule.
      previous: parameters at the start of this iteration.
      older: those at the starts of earlier ones, the newest first.
      updates: number of updates.
      begun: number of iterations that have begun, this one included.
    """

    others: Any
    previous: Any
    older: Any
    updates: Any
    begun: Any


def with_past_policies(
    length: int, number: int, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An unchanged update rule that keeps the parameters of the starts of several iterations.

    Args:
      length: number of updates in an iteration, >= 1.
      number: of iterations, this one included, >= 2. Before there are as many, the first parameters
        stand for the missing ones.
      others: the update rule.
    """
    if length < 1:
        raise UserError(f"iteration: {length} is not positive")

    def init(params: Any) -> HistoryState:
        first = [jax.tree.map(jnp.copy, params) for _ in range(number)]
        return HistoryState(
            others=others.init(params),
            previous=first[0],
            older=tuple(first[1:]),
            updates=jnp.int32(0),
            begun=jnp.int32(1),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HistoryState]:
        updates, inner = others.update(updates, state.others, params)
        moved, done = optax.apply_updates(params, updates), state.updates + 1
        begins = done % length == 0
        kept = state.previous, *state.older
        past = [
            jax.tree.map(lambda new, old: jnp.where(begins, new, old), new, old)
            for new, old in zip((moved, *kept), kept, strict=False)
        ]
        return updates, HistoryState(
            others=inner,
            previous=past[0],
            older=tuple(past[1:]),
            updates=done,
            begun=state.begun + begins.astype(jnp.int32),
        )

    return optax.GradientTransformation(init, update)


class ExtragradientState(NamedTuple):
    """State of `with_extragradient`.

    Attributes:
      others: state of the update rule, which second steps alone change.
      start: parameters before the first step of the pair.
      halfway: whether the first step has been taken.
    """

    others: Any
    start: Any
    halfway: Any


def with_extragradient(others: optax.GradientTransformation) -> optax.GradientTransformation:
    r"""Pairs of steps from the same parameters: the first one is undone before the second one.

    .. math:: \theta_{t + 1/2} = \theta_t - U(g_t), \quad
              \theta_{t + 1} = \theta_t - U(g_{t + 1/2})

    Both gradients are those at :math:`\theta_t`: take a step's gradient at `undone`. The state of
    the update rule U (moments, the count of its schedule) is read by both steps and changed by the
    second alone, so a pair of steps counts as one.

    Args:
      others: the update rule U.

    References:
      Zhou et al., 2025, arXiv:2503.08942; `lms/trainers/extragradient_trainer.py` of the authors
      restores the optimiser, too.
    """

    def init(params: Any) -> ExtragradientState:
        return ExtragradientState(
            others=others.init(params),
            start=jax.tree.map(jnp.copy, params),
            halfway=jnp.bool_(False),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ExtragradientState]:
        updates, inner = others.update(updates, state.others, params)

        def after_second(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(state.halfway, x, y), new, old)

        return updates, ExtragradientState(
            others=after_second(inner, state.others),
            start=jax.tree.map(jnp.asarray, params),
            halfway=~state.halfway,
        )

    return optax.GradientTransformation(init, update)


def undone(params: Any, state: ExtragradientState) -> Any:
    """The parameters from which the next step is taken: without a first step."""
    return jax.tree.map(lambda x, y: jnp.where(state.halfway, y, x), params, state.start)


def preconditioner(opt_state: Any, *, b2: float, eps: float) -> Any:
    r"""AdamW's factor on each element of the first moment, without the learning rate.

    .. math:: P = \frac{1}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
      opt_state: of `make_optimizer("adamw", ...)`, after the update.
      b2: decay of the second moment v.
      eps: added to the root.

    Returns:
      A tree like the trained parameters.

    Raises:
      ValueError: the state holds no AdamW moments.
    """

    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    states = [state for state in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(state)]
    if len(states) != 1:
        raise ValueError(f"opt_state: holds {len(states)} AdamW states instead of one")
    correction = 1.0 - b2 ** states[0].count.astype(jnp.float32)
    return jax.tree.map(lambda v: 1.0 / (jnp.sqrt(v / correction) + eps), states[0].nu)


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule | float,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float | None = None,
    parameter_scale: bool = False,
) -> optax.GradientTransformation:
    """A chain of global-norm clipping and one of optax's optimisers.

    Args:
      name: adamw, adafactor, lion, rmsprop or sgd.
      learning_rate: a number or a schedule.
      weight_decay: decoupled decay of matrices only (`decays`).
      clip_norm: largest global norm of the gradient; None: no clipping.
      b1: decay of the first moment (adamw, lion).
      b2: decay of the second moment (adamw, lion, rmsprop).
      eps: added to the root of the second moment (adamw, rmsprop).
      momentum: for sgd and rmsprop; None: no momentum.
      parameter_scale: whether adafactor's rate is relative to each parameter's root mean square.

    Raises:
      UserError: the name is not known.
    """
    match name:
        case "adamw":
            rule = optax.adamw(
                learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays
            )
        case "adafactor":
            rule = optax.adafactor(
                learning_rate,
                multiply_by_parameter_scale=parameter_scale,
                weight_decay_rate=weight_decay or None,
                weight_decay_mask=decays,
            )
        case "lion":
            rule = optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
        case "rmsprop" | "sgd":
            rule = (
                optax.rmsprop(learning_rate, decay=b2, eps=eps, momentum=momentum)
                if name == "rmsprop"
                else optax.sgd(learning_rate, momentum=momentum)
            )
            if weight_decay:
                rule = optax.chain(optax.add_decayed_weights(weight_decay, mask=decays), rule)
        case _:
            raise UserError(f"optimizer: {name!r} is not one of {', '.join(OPTIMIZERS)}")
    return rule if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), rule)
