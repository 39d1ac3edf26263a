"""An online algorithm: which policies sample, and which pure loss updates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.losses import SampleLogProbs
from jaxalign.online.rollouts import Rollout


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Where a response to a prompt comes from: the data, or the geometric mixture of policies."""

    policy: float = 1.0
    """Weight of the policy that is trained."""
    reference: float = 0.0
    """Weight of the frozen reference."""
    average: float = 0.0
    """Weight of the policy with the running average of all parameters so far."""
    previous: float = 0.0
    """Weight of the policy as it was when the iteration began."""
    from_data: bool = False
    """It is the response that stands beside the prompt; no policy samples."""

    @property
    def weights(self) -> dict[str, float]:
        """The policies that have any weight."""
        named = {name: weight for name, weight in vars(self).items() if name != "from_data"}
        return {} if self.from_data else {name: x for name, x in named.items() if x}


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Who samples and what is minimised.

    Attributes:
      draws: for each response to a prompt, where it comes from.
      loss: rollout -> one value per prompt, not reduced.
      annotation: what the loss reads of the annotator, if anything.
      trained: the first so many responses have log-probs in the loss.
      average_decay: decay of the running average of parameters; None: there is none.
      iteration: rollouts of an iteration: the loss's reference is then the policy as it was when
        the iteration began, which may also sample; None: it is the frozen reference.
      updates: passes over each rollout.
      minibatches: parts of a rollout, drawn anew in each pass, that make an update each.
      per_token: whether the loss is a sum over tokens that the step divides by all tokens, instead
        of a value per prompt.
      advantages: (samples as the sampling policy scored them, rewards, values) -> advantages and
        returns of tokens; a value head is then trained with the policy. None: there is no critic.
    """

    draws: tuple[Draw, ...]
    loss: Callable[[Rollout], Float[Array, " prompts"]]
    annotation: Literal["preferences", "rewards", "none"]
    trained: int
    average_decay: float | None = None
    iteration: int | None = None
    updates: int = 1
    minibatches: int = 1
    per_token: bool = False
    advantages: Callable[[SampleLogProbs, Array, Array], tuple[Array, Array]] | None = None

    def __post_init__(self):
        if not 1 <= self.trained <= len(self.draws):
            raise UserError(f"trained: {self.trained} of {len(self.draws)} responses")
        for name in ("updates", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        if self.iteration is not None and self.average_decay is not None:
            raise UserError("iteration: an algorithm keeps an average or iterations, not both")

    @property
    def reads_data(self) -> bool:
        """Whether it learns from responses that stand beside the prompts."""
        return any(draw.from_data for draw in self.draws)


def mixture_with_reference(beta: float) -> Draw:
    """The mixture of policy and reference in which the reference has weight beta.

    Raises:
      UserError: the weight is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise UserError(f"beta: {beta} is not in [0, 1]")
    return Draw(policy=1.0 - beta, reference=beta)
