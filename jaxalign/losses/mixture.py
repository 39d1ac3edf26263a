"""Weighted sums of losses: MPO, RPO and any other mixture as a configuration."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses.labelled import LabelledLogProbs
from jaxalign.losses.pairs import PairLogProbs
from jaxalign.losses.statistics import (
    Arguments,
    Statistics,
    Weight,
    statistics_of,
    with_statistics,
)

PreferenceLoss = Callable[..., Float[Array, " pairs"]]
WEIGHTED = re.compile(r"(?P<name>\S+):(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
"""A member with its weight: `dpo:0.8`, `FILE.py:FUNCTION:0.2`."""


def weighted(members: Sequence[tuple[PreferenceLoss, float]]) -> PreferenceLoss:
    r"""A weighted sum of losses of pairs, as one loss.

    .. math:: \ell = \sum_k \lambda_k \ell_k, \quad d_w = \sum_k \lambda_k d_{w,k}, \quad
              d_l = \sum_k \lambda_k d_{l,k}

    An option of a member is named `MEMBER.OPTION`, e.g. `mixture(pairs, **{"dpo.beta": 0.3})`. The
    batch statistics and running statistics of a member keep its name in the same way
    (`bco.mean_log_ratio`). The members are in the attribute `members` of the result.

    Args:
      members: losses of `PairLogProbs` and their weights, each at least 0; names are different.

    Returns:
      The sum, a function of pairs and options to one value per pair.

    Raises:
      UserError: there is no member, two have the same name, or a weight is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxalign.losses import PairLogProbs, dpo, sft, weighted
      >>> logps, length = jnp.array([-6.0]), jnp.array([3])
      >>> pairs = PairLogProbs(
      ...     chosen=logps, rejected=logps, reference_chosen=logps, reference_rejected=logps,
      ...     chosen_length=length, rejected_length=length)
      >>> print(f"{weighted([(dpo, 1.0), (sft, 0.2)])(pairs)[0]:.4f}")  # log 2 + 0.2 * 6 / 3
      1.0931

    References:
      MPO: Wang et al., 2024, arXiv:2411.10442, equation 1 (`dpo:0.8 bco:0.2 sft:1`). RPO: Pang et
      al., 2024, arXiv:2404.19733 (`dpo:1 sft:1`).
    """
    if not members:
        raise UserError("loss: a mixture needs at least one loss")
    if any(not hasattr(loss, "__name__") for loss, _ in members):
        raise UserError("loss: a mixture is of functions; set options by name, as in dpo.beta")
    names = [loss.__name__ for loss, _ in members]
    losses = {name: loss for name, (loss, _) in zip(names, members, strict=True)}
    weights = {name: float(weight) for name, (_, weight) in zip(names, members, strict=True)}
    if len(losses) < len(members):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"loss: {twice} is in the mixture twice; add up its weights")
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise UserError(f"loss: {name}:{weight:g}: a weight must be >= 0")

    def mixture(pairs: PairLogProbs, **options: Any) -> Float[Array, " pairs"]:
        own = options_by_member(options, losses)
        parts = [weights[name] * loss(pairs, **own[name]) for name, loss in losses.items()]
        return sum(parts[1:], parts[0])

    mixture.__name__ = " ".join(f"{name}:{weight:g}" for name, weight in weights.items())
    mixture.__doc__ = f"Weighted sum of losses: {mixture.__name__}."
    mixture.__dict__["members"] = losses
    declared = {name: statistics_of(loss) for name, loss in losses.items()}
    coupled = {name: statistics for name, statistics in declared.items() if statistics is not None}
    return with_statistics(_joined(coupled))(mixture) if coupled else mixture


def members_of(loss: PreferenceLoss) -> Mapping[str, PreferenceLoss]:
    """The members of a mixture by name; of any other loss, none."""
    return getattr(loss, "members", {})


def function_name(name: str) -> str:
    """The name of the function in `dpo` or `FILE.py:FUNCTION`, by which its options are named."""
    return name.rpartition(":")[2]


def options_by_member(
    options: Mapping[str, Any], names: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Options `MEMBER.OPTION` as those of each member.

    Raises:
      UserError: an option names no member.
    """
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        name, _, option = key.partition(".")
        if name not in own or not option:
            first = next(iter(own))
            raise UserError(
                f"loss_options: {key}: in a mixture, name the loss and its option, e.g. "
                f"{first}.{option or name}; the losses are {', '.join(own)}"
            )
        own[name][option] = value
    return own


def members_in(text: str, known: Collection[str]) -> list[tuple[str, float]]:
    """Names and weights in `dpo:1.0 sft:0.2`; a single loss is none.

    Args:
      text: a loss, or several with a space between; a weight that is not given is 1.
      known: names of losses. Words without a weight are members if they are all known; else the
        text is the path of one loss.

    Returns:
      Name and weight of each member; empty: the text names one loss without a weight.
    """
    words = text.split()
    matches = [WEIGHTED.fullmatch(word) for word in words]
    several = len(words) > 1 and all(word in known for word in words)
    if not several and not any(matches):
        return []
    return [
        (word, 1.0) if match is None else (match["name"], float(match["weight"]))
        for word, match in zip(words, matches, strict=True)
    ]


def _joined(members: Mapping[str, Statistics]) -> Statistics:
    """The statistics of all members, under the members' names."""

    def under(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{name}.{key}": value for key, value in values.items()}

    def of_member(name: str, running: Mapping[str, Array]) -> dict[str, Array]:
        return {key: running[f"{name}.{key}"] for key in members[name].start}

    def batch(pairs: PairLogProbs | LabelledLogProbs, weight: Weight = None) -> Arguments:
        taken = [under(name, one.batch(pairs, weight)) for name, one in members.items()]
        return {key: value for part in taken for key, value in part.items()}

    def update(
        running: Mapping[str, Array], pairs: PairLogProbs | LabelledLogProbs, weight: Weight
    ) -> Arguments:
        updated = dict(running)
        for name, one in members.items():
            if one.update is not None:
                updated |= under(name, one.update(of_member(name, running), pairs, weight))
        return updated

    updates = any(one.update is not None for one in members.values())
    return Statistics(
        batch=batch,
        start={
            key: x for name, one in members.items() for key, x in under(name, one.start).items()
        },
        update=update if updates else None,
        arguments=tuple(f"{name}.{key}" for name, one in members.items() for key in one.arguments),
    )
