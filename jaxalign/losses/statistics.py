"""Arguments of a loss that are computed from its whole batch, and running statistics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from jaxtyping import Array, Float

from jaxalign.losses.labelled import LabelledLogProbs
from jaxalign.losses.pairs import PairLogProbs

Weight = Float[Array, " pairs"] | None
Arguments = dict[str, Array]
Loss = TypeVar("Loss", bound=Callable)


def no_arguments(pairs: PairLogProbs | LabelledLogProbs, weight: Weight = None) -> Arguments:
    """No arguments: nothing is computed from the batch."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Where the batch-wide arguments of a loss come from.

    The training step computes them over all pairs of the batch with a weight above 0, across
    micro-batches, devices and processes, and passes them to the loss as keyword arguments. A
    held-out loss computes them over the whole held-out set. Declare those of your own loss with
    `with_statistics`.

    Attributes:
      batch: `(pairs, weight)` -> keyword arguments, scalars or one value per pair, without
        gradient; pairs of weight 0 are padding and must not be counted.
      start: running statistics before the first step, by name. They are saved in checkpoints,
        and the loss takes those named in `arguments`.
      update: `(running, pairs, weight)` -> the running statistics with this batch; called before
        the loss of a training batch, never on held-out pairs.
      arguments: names of the running statistics that are arguments of the loss.
      mismatched: whether `batch` reads log-ratios of prompts with the responses of other rows, for
        losses of `LabelledLogProbs`; they cost a pass of the policy and one of the reference.
    """

    batch: Callable[..., Arguments] = no_arguments
    start: Mapping[str, float] = field(default_factory=dict)
    update: Callable[..., Arguments] | None = None
    arguments: tuple[str, ...] = ()
    mismatched: bool = False

    def of(
        self, pairs: PairLogProbs | LabelledLogProbs, weight: Weight, running: Mapping[str, Array]
    ) -> Arguments:
        """The keyword arguments of the loss for these pairs.

        Without running statistics the loss uses its own defaults.
        """
        kept = {name: running[name] for name in self.arguments if name in running}
        return {**self.batch(pairs, weight), **kept}


def with_statistics(statistics: Statistics) -> Callable[[Loss], Loss]:
    """Declare what a loss computes from its batch.

    Example: `@with_statistics(Statistics(batch=my_statistics))` above a loss that has a keyword
    argument of each name that `my_statistics(pairs, weight)` returns.
    """

    def declare(loss: Loss) -> Loss:
        loss.__dict__["statistics"] = statistics
        return loss

    return declare


def statistics_of(loss: Callable) -> Statistics | None:
    """What a loss declares to compute from its batch; None: nothing."""
    declared = getattr(loss, "statistics", None)
    return declared if isinstance(declared, Statistics) else None
