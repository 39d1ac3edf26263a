"""An entry of the table of losses: the function, and what the step computes for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array, Float

from jaxalign.losses.statistics import Statistics, statistics_of

PreferenceLoss = Callable[..., Float[Array, " pairs"]]
"""A loss: pairs and hyperparameters to one value per pair."""

Reads = Literal[
    "pairs", "policy_pairs", "tokens", "scores", "samples", "states", "labelled", "responses"
]
"""What a loss reads.

`pairs`: `PairLogProbs` of policy and reference. `policy_pairs`: `PairLogProbs` of the policy alone.
`tokens`: `TokenLogProbs`. `scores`: scores of a scalar head. `samples`: annotated responses of an
online stage. `states`: hidden states. `labelled`: `LabelledLogProbs` of single responses.
`responses`: rated responses, or responses to imitate.
"""


@dataclass(frozen=True)
class Loss:
    """A loss and what the training step must know about it; the rest is in its docstring.

    Attributes:
      function: pure function from what it reads to one value per row, not reduced.
      reads: what its first arguments are.
      contrastive: whether the two rows of a pair are one response under two opposite instructions.
    """

    function: Callable[..., Any]
    reads: Reads
    contrastive: bool = False

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.function.__name__

    @property
    def statistics(self) -> Statistics | None:
        """What the loss computes from its whole batch; None: its pairs are independent."""
        return statistics_of(self.function)

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its batch."""
        return self.statistics is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs of the reference."""
        return self.reads in ("pairs", "tokens", "labelled")
