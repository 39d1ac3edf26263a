"""A loss by name: an entry of the table, or a function in a user's own file."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxalign.errors import UserError, notice_once
from jaxalign.losses import (
    LOSSES,
    LabelledLogProbs,
    Loss,
    PairLogProbs,
    PreferenceLoss,
    Reads,
    Statistics,
    Switches,
    TokenLogProbs,
    function_name,
    members_in,
    options_by_member,
    statistics_of,
    weighted,
    with_statistics,
)
from jaxalign.modules import (
    check_options,
    errors_in_one_line,
    find_function,
    parameters_of,
    users_code,
)

TRAINABLE = {
    loss.name: loss
    for loss in LOSSES
    if loss.reads in ("pairs", "policy_pairs", "tokens", "scores")
}
"""The losses of the table that `--loss` may name."""


def find_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """The loss of that name, checked before any training.

    Args:
      name: an entry of the table, or a function of the user's own as "FILE.py:FUNCTION". The first
        argument of such a function is annotated `TokenLogProbs` where it reads tokens. Several of
        them with weights are a mixture: "dpo:1.0 sft:0.2".
      options: its hyperparameters; of a mixture, those of its members as `MEMBER.OPTION`.

    Returns:
      The loss. What a user's own function reads, and whether it couples the pairs of a batch, is
      found by calling it.

    Raises:
      UserError: there is no such loss, it does not take the options or cannot be mixed, or it does
        not return a finite, differentiable number for each of two ordinary pairs.
    """
    if members := members_in(name, TRAINABLE):
        return _mixture(members, options)
    if name in TRAINABLE:
        loss = TRAINABLE[name]
        inputs = [jnp.zeros(2)] * 2 if loss.reads == "scores" else [_ordinary(loss.reads, 0.0)]
        try:  # the loss itself says which hyperparameter is out of range
            jax.eval_shape(functools.partial(loss.function, **options), *inputs)
        except ValueError as error:
            raise UserError(f"loss_options: {name}: {str(error).splitlines()[0]}") from error
        return loss
    return own_loss(find_function(name, "loss"), options, name=name)


def _mixture(members: Sequence[tuple[str, float]], options: Mapping[str, Any]) -> Loss:
    """The weighted sum of losses of pairs."""
    own = options_by_member(options, [function_name(name) for name, _ in members])
    found = [find_loss(name, own[function_name(name)]) for name, _ in members]
    for loss in found:
        if loss.reads not in ("pairs", "policy_pairs"):
            what = "scores" if loss.reads == "scores" else "distributions at every token"
            raise UserError(f"loss: {loss.name} reads {what}, so it cannot be mixed; name it alone")
        if loss.contrastive != found[0].contrastive:
            one, other = sorted((loss, found[0]), key=lambda x: not x.contrastive)
            raise UserError(
                f"loss: {one.name} compares one response under two instructions, so it cannot be "
                f"mixed with {other.name}"
            )
    weights = [weight for _, weight in members]
    return Loss(
        weighted([(loss.function, x) for loss, x in zip(found, weights, strict=True)]),
        "pairs" if any(loss.reads == "pairs" for loss in found) else "policy_pairs",
        contrastive=found[0].contrastive,
    )


def find_labelled_loss(name: str, options: Mapping[str, Any]) -> Loss:
    """The loss of single responses of that name, checked before any training.

    Args:
      name: an entry of the table, or a function of `LabelledLogProbs` as "FILE.py:FUNCTION".
      options: its hyperparameters.

    Returns:
      The loss; one of a user's own is taken to couple its batch if it declares statistics.

    Raises:
      UserError: there is no such loss, it does not take the options, or it does not return a
        finite, differentiable number for each of two ordinary responses.
    """
    known = {loss.name: loss for loss in LOSSES if loss.reads == "labelled"}
    if name in known:
        try:  # the loss itself says which hyperparameter is out of range
            jax.eval_shape(
                functools.partial(known[name].function, **options), _ordinary("labelled", 0.0)
            )
        except ValueError as error:
            said = str(error).splitlines()[0]
            raise UserError(f"feedback.loss_options: {name}: {said}") from error
        return known[name]
    function = find_function(name, "feedback.loss")
    first, *rest = parameters_of(function, f"feedback.loss: {name}") or (None,)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise UserError(
            f"feedback.loss: {name} takes no responses; let its first argument be a "
            "LabelledLogProbs"
        )
    check_options(rest, options, f"feedback.loss_options: {name}", "--feedback.loss-options")
    with users_code(f"feedback.loss: {name} fails on two responses"):
        _check_values(function, name, options, "labelled")
    return Loss(errors_in_one_line(function, f"feedback.loss: {name}"), "labelled")


def own_loss(function: PreferenceLoss, options: Mapping[str, Any], *, name: str = "") -> Loss:
    """A user's own function as a loss, checked on ordinary pairs.

    Args:
      function: from pairs and hyperparameters to one value per pair.
      options: its hyperparameters.
      name: for messages; by default the function's own.

    Raises:
      UserError: it does not take the options, or does not return a finite, differentiable number
        for each of two ordinary pairs.
    """
    name = name or getattr(function, "__name__", "loss")
    reads: Reads = "tokens" if _takes_tokens(function, name, options) else "pairs"
    coupled = False
    with users_code(f"loss: {name} fails on two pairs"):
        _check_values(function, name, options, reads)
        if reads == "pairs":
            reads = "pairs" if reads_reference(function, options) else "policy_pairs"
            coupled = couples_pairs(function, options)
    found = errors_in_one_line(function, f"loss: {name}")
    if coupled and statistics_of(found) is None:
        found = with_statistics(Statistics())(found)
    return Loss(found, reads)


def reads_reference(loss: PreferenceLoss, options: Mapping[str, Any]) -> bool:
    """Whether a loss depends on the reference log-probs: NaN in them shows in its values."""
    nan = jnp.full(2, jnp.nan)
    pairs = _two_pairs(reference_chosen=nan, reference_rejected=nan)
    return bool(jnp.isnan(loss(pairs, **options)).any())


def couples_pairs(loss: PreferenceLoss, options: Mapping[str, Any]) -> bool:
    """Whether the loss of a pair depends on its batch: that of the first changes with the second.

    Raises:
      ValueError: it does not return one value per pair.
    """
    above, below = jnp.array([0.0, 50.0]), jnp.array([0.0, -50.0])
    probes: list[dict[str, Array]] = [{}, {"chosen": above}, {"chosen": below}, {"rejected": above}]
    firsts, statistics = set(), statistics_of(loss) or Statistics()
    for second in probes:
        pairs = _two_pairs(**second, reference_chosen=jnp.array([0.0, 0.5]))
        values = loss(pairs, **{**statistics.of(pairs, None, {}), **options})
        if jnp.shape(values) != (2,):
            raise ValueError(f"it returns shape {jnp.shape(values)} instead of one value per pair")
        firsts.add(float(values[0]))
    return len(firsts) > 1 or statistics_of(loss) is not None


def check_switches(loss: Loss, options: Mapping[str, Any], switches: Switches) -> None:
    """Check that a loss of pairs reads what the switches act on.

    Args:
      loss: of `PairLogProbs`.
      options: its hyperparameters.
      switches: of the step.

    Raises:
      UserError: a switch leaves the loss as it is.
    """
    statistics = loss.statistics or Statistics()

    def values(switches: Switches) -> np.ndarray:
        pairs = switches.seen(_two_pairs(chosen=jnp.array([0.0, 3.0])))
        taken = statistics.of(pairs, None, {})
        return np.asarray(loss.function(pairs, **{**taken, **options}))

    if switches.calibration != "none":
        pairs = _two_pairs(chosen=jnp.array([0.0, 3.0]))

        def total(rejected: Array) -> Array:
            moved = dataclasses.replace(pairs, rejected=rejected)
            taken = statistics.of(moved, None, {})
            return loss.function(moved, **{**taken, **options}).sum()

        if not np.any(jax.grad(total)(pairs.rejected)):
            raise UserError(
                f"calibration: {loss.name} does not read the rejected response; set none"
            )
    plain = values(Switches())
    scored, mean = Switches(divergence=switches.divergence), Switches(log_probs=switches.log_probs)
    if scored != Switches() and np.array_equal(values(scored), plain):
        raise UserError(
            f"divergence: {loss.name} does not read the log-ratio of policy and reference "
            "(`pairs.margin`, `pairs.chosen_log_ratio`); set reverse_kl"
        )
    if mean != Switches() and np.array_equal(values(mean), plain):
        raise UserError(f"log_probs: {loss.name} reads means over tokens itself; set sum")


def _two_pairs(**added: Array) -> PairLogProbs:
    """Two pairs to probe a loss with; `added` is added to the fields of those names."""
    zeros = jnp.zeros(2)
    return PairLogProbs(
        chosen=-102.0 + added.get("chosen", zeros),
        rejected=-103.0 + added.get("rejected", zeros),
        reference_chosen=-102.5 + added.get("reference_chosen", zeros),
        reference_rejected=-102.0 + added.get("reference_rejected", zeros),
        chosen_length=jnp.full(2, 4, jnp.int32),
        rejected_length=jnp.full(2, 4, jnp.int32),
    )


def _takes_tokens(loss: Callable[..., Any], name: str, options: Mapping[str, Any]) -> bool:
    """Whether a user's loss takes tokens; its other arguments must be the options."""
    first, *rest = parameters_of(loss, f"loss: {name}") or (None,)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise UserError(f"loss: {name} takes no pairs; let its first argument be a PairLogProbs")
    check_options(rest, options, f"loss_options: {name}", "--loss-options")
    return first.annotation is TokenLogProbs


def _ordinary(reads: Reads, apart: float) -> PairLogProbs | TokenLogProbs | LabelledLogProbs:
    """Two pairs, or labelled responses, of four tokens each as they occur in training.

    Args:
      reads: `tokens`, `labelled`, or else log-probs of pairs summed over tokens.
      apart: distance of the policy from its reference, in nats.
    """
    if reads == "labelled":
        return LabelledLogProbs(
            log_prob=jnp.array([-12.0 + apart, -15.0 - apart]),
            reference=jnp.array([-12.0, -15.0]),
            desirable=jnp.array([True, False]),
            length=jnp.full(2, 4, jnp.int32),
            mismatched_log_ratio=jnp.array([apart, -apart]),
        )
    pairs = PairLogProbs(
        chosen=jnp.array([-12.0 + apart, -15.0 - apart]),
        rejected=jnp.array([-13.0 - apart, -14.0 + apart]),
        reference_chosen=jnp.array([-12.0, -15.0]),
        reference_rejected=jnp.array([-13.0, -14.0]),
        chosen_length=jnp.full(2, 4, jnp.int32),
        rejected_length=jnp.full(2, 4, jnp.int32),
    )
    if reads != "tokens":
        return pairs

    def per_token(sums: Array) -> Array:
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
    loss: Callable[..., Any], name: str, options: Mapping[str, Any], reads: Reads
) -> None:
    """A loss returns a finite float per pair, compiled and differentiated as in training."""
    sides = ("chosen", "rejected", "chosen_kl", "rejected_kl")[: 4 if reads == "tokens" else 2]
    sides = ("log_prob",) if reads == "labelled" else sides

    def mean(learned: dict[str, Array], pairs: Any) -> tuple[Array, Array]:
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
        pairs = _ordinary(reads, apart)
        slopes, values = gradient({one: getattr(pairs, one) for one in sides}, pairs)
        for what, array in (("value", values), *((f"gradient of {x}", slopes[x]) for x in sides)):
            if not bool(jnp.isfinite(array).all()):
                when = "where the policy is its reference" if not apart else f"{apart} nats off it"
                numbers = ", ".join(f"{x:g}" for x in np.asarray(array).reshape(-1)[:4])
                raise UserError(f"loss: {name}: the {what} is not finite {when}: {numbers}")
        moves = moves or any(bool(array.any()) for array in slopes.values())
    if not moves:
        zero = "its gradient is zero on all pairs that were tried; it learns nothing"
        notice_once(f"loss: {name}: {zero}")
