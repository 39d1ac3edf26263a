"""Which loss or online algorithm a name on the command line stands for."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.losses import (
    BATCH_COUPLED,
    PREFERENCE_LOSSES,
    REWARD_LOSSES,
    TOKEN_LOSSES,
    PairLogProbs,
    TokenLogProbs,
)
from jaxalign.modules import find_function, users_code
from jaxalign.online import ALGORITHMS, Algorithm
from jaxalign.training.objectives import couples_pairs


def find_loss(name: str, options: dict[str, Any]) -> tuple[Any, bool, bool]:
    """A loss of the table, or a function of the user's own: "FILE.py:FUNCTION".

    Args:
      name: a row of the table, or file (or module) and function with a colon between.
      options: hyperparameters that it must take.

    Returns:
      The function, whether it reads tokens (its first argument is annotated `TokenLogProbs`), and
      whether a pair's value depends on its batch.

    Raises:
      UserError: there is none, it does not take the options, or it does not give a finite number
        for each of two ordinary pairs that JAX can differentiate.
    """
    known: dict[str, Any] = PREFERENCE_LOSSES | TOKEN_LOSSES | REWARD_LOSSES
    if name in known:
        loss, reads_tokens = known[name], name in TOKEN_LOSSES
        pairs = [jnp.zeros(2)] * 2 if name in REWARD_LOSSES else [_ordinary(reads_tokens, 0.0)]
        try:  # its own words say which hyperparameter is out of range
            jax.eval_shape(functools.partial(loss, **options), *pairs)
        except ValueError as error:
            raise UserError(f"loss_options: {name}: {str(error).splitlines()[0]}") from error
        return loss, reads_tokens, name in BATCH_COUPLED
    loss = find_function(name, "loss")
    reads_tokens = _reads_tokens(loss, name, options)
    with users_code(f"loss: {name} fails on two pairs"):
        _check_values(loss, name, options, reads_tokens)
        coupled = not reads_tokens and couples_pairs(loss, options)
    return _in_one_line(loss, f"loss: {name}"), reads_tokens, coupled


def _in_one_line(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The function of a user's, its errors in one line: what fits two pairs may not fit a batch."""

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        with users_code(what):
            return function(*arguments, **options)

    return called


def _reads_tokens(loss: Callable[..., Any], name: str, options: Mapping[str, Any]) -> bool:
    """Whether a loss asks for tokens; its arguments must be those that it will get."""
    first, *rest = parameters_of(loss, f"loss: {name}") or (None,)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise UserError(f"loss: {name} takes no pairs; let its first argument be a PairLogProbs")
    _check_options(rest, options, f"loss_options: {name}", "--loss-options")
    return first.annotation is TokenLogProbs


def parameters_of(function: Callable[..., Any], what: str) -> list[inspect.Parameter]:
    """The parameters of a function of the user's, annotations resolved where they can be.

    Args:
      function: the user's.
      what: begins the message.

    Raises:
      UserError: it cannot be told what it takes.
    """
    try:
        try:
            return list(inspect.signature(function, eval_str=True).parameters.values())
        except (NameError, SyntaxError, AttributeError, TypeError):
            return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: its arguments cannot be read; write a plain function") from error


def _check_options(
    parameters: list[inspect.Parameter], options: Mapping[str, Any], what: str, flag: str
) -> None:
    """Options are parameters, and parameters without a default are options."""
    named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    names = [one.name for one in named if one.kind is not one.POSITIONAL_ONLY]
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    if (unknown := sorted(set(options) - set(names))) and not anything:
        raise UserError(f"{what} has no {', '.join(unknown)}; it has {', '.join(names) or 'none'}")
    needed = [one.name for one in named if one.default is one.empty and one.name not in options]
    if needed:
        values = " ".join(f"{name} VALUE" for name in needed)
        raise UserError(f"{what} needs {', '.join(needed)}; set {flag} {values}")


def _ordinary(tokens: bool, apart: float) -> Any:
    """Two pairs of four tokens each as they occur in training.

    Args:
      tokens: per token, or summed.
      apart: how far the policy is from its reference, in nats.
    """
    pairs = PairLogProbs(
        chosen=jnp.array([-12.0 + apart, -15.0 - apart]),
        rejected=jnp.array([-13.0 - apart, -14.0 + apart]),
        reference_chosen=jnp.array([-12.0, -15.0]),
        reference_rejected=jnp.array([-13.0, -14.0]),
        chosen_length=jnp.full(2, 4, jnp.int32),
        rejected_length=jnp.full(2, 4, jnp.int32),
    )
    if not tokens:
        return pairs

    def per_token(sums: jax.Array) -> jax.Array:
        return jnp.repeat(sums[:, None] / 4, 4, axis=1)

    return TokenLogProbs(
        chosen=per_token(pairs.chosen),
        rejected=per_token(pairs.rejected),
        reference_chosen=per_token(pairs.reference_chosen),
        reference_rejected=per_token(pairs.reference_rejected),
        chosen_kl=jnp.full((2, 4), 0.01 * apart),
        rejected_kl=jnp.full((2, 4), 0.01 * apart),
        chosen_mask=jnp.ones((2, 4), bool),
        rejected_mask=jnp.ones((2, 4), bool),
    )


def _check_values(
    loss: Callable[..., Any], name: str, options: Mapping[str, Any], reads_tokens: bool
) -> None:
    """A loss gives a finite float for each pair, compiled and differentiated as in training."""
    sides = ("chosen", "rejected", "chosen_kl", "rejected_kl")[: 4 if reads_tokens else 2]

    def mean(learned: dict[str, jax.Array], pairs: Any) -> tuple[jax.Array, jax.Array]:
        fields = {one: getattr(pairs, one) for one in pairs.__dataclass_fields__} | learned
        values = loss(type(pairs)(**fields), **options)
        if not isinstance(values, jax.Array | np.ndarray | np.generic | float | int):
            raise UserError(
                f"loss: {name} returns a {type(values).__name__} instead of one value per pair"
            )
        if jnp.shape(values) != (2,):
            raise UserError(
                f"loss: {name} returns shape {jnp.shape(values)} for two pairs instead of one "
                "value per pair; leave the mean to the step"
            )
        if not jnp.issubdtype(jnp.result_type(values), jnp.floating):
            raise UserError(
                f"loss: {name} returns {jnp.result_type(values)}, which has no gradient; return "
                "floats"
            )
        values = jnp.asarray(values)
        return values.mean(), values

    gradient = jax.jit(jax.grad(mean, has_aux=True))
    moves = False
    for apart in (0.0, 0.5, -3.0):
        pairs = _ordinary(reads_tokens, apart)
        found, values = gradient({one: getattr(pairs, one) for one in sides}, pairs)
        for what, array in (("value", values), *((f"gradient of {x}", found[x]) for x in sides)):
            if not bool(jnp.isfinite(array).all()):
                when = "where the policy is its reference" if not apart else f"{apart} nats off it"
                numbers = ", ".join(f"{x:g}" for x in np.asarray(array).reshape(-1)[:4])
                raise UserError(f"loss: {name}: the {what} is not finite {when}: {numbers}")
        moves = moves or any(bool(array.any()) for array in found.values())
    if not moves:
        _warn(f"loss: {name}: its gradient is zero on all pairs that were tried; it learns nothing")


@functools.cache
def _warn(line: str) -> None:
    """Once, however often a loss is looked up."""
    print(f"warning: {line}", file=sys.stderr)


def find_algorithm(name: str, options: Mapping[str, float]) -> Algorithm:
    """An online algorithm of the table, or a function of the user's own: "FILE.py:FUNCTION".

    Raises:
      UserError: there is none of that name, or it lacks an option.
    """
    found: Any = ALGORITHMS.get(name)
    own = found is None
    if own:
        if ":" not in name:
            raise UserError(
                f"rollout.algorithm: {name!r} is neither FILE.py:FUNCTION nor one of "
                f"{', '.join(ALGORITHMS)}"
            )
        found = find_function(name, "algorithm")
    parameters = parameters_of(found, f"rollout.algorithm: {name}")
    _check_options(parameters, options, f"rollout.options: {name}", "--rollout.options")
    whole = {one.name for one in parameters if isinstance(one.default, int)}
    for key, value in options.items():  # options are numbers on the command line
        if key in whole and value != int(value):
            raise UserError(f"rollout.options: {key}: {value} is not a whole number")
    values = {key: int(x) if key in whole else float(x) for key, x in options.items()}
    with users_code(f"rollout.algorithm: {name}"):
        algorithm = found(**values)
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"rollout.algorithm: {name} returned {type(algorithm).__name__}")
    if not own:
        return algorithm
    loss = _in_one_line(algorithm.loss, f"rollout.algorithm: {name}: loss")
    return dataclasses.replace(algorithm, loss=loss)
