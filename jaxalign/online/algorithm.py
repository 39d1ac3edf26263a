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
    """Source of a response to a prompt: the data, or a geometric mixture of policies."""

    policy: float = 1.0
    """Weight of the policy that is trained."""
    reference: float = 0.0
    """Weight of the frozen reference."""
    average: float = 0.0
    """Weight of the policy with the running average of all parameters so far."""
    previous: float = 0.0
    """Weight of the policy at the start of the iteration."""
    from_data: bool = False
    """Whether it is the response in the prompt data; no policy samples it."""

    @property
    def weights(self) -> dict[str, float]:
        """The policies with nonzero weights."""
        named = {name: weight for name, weight in vars(self).items() if name != "from_data"}
        return {} if self.from_data else {name: x for name, x in named.items() if x}


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Sampling policies and loss of an online algorithm.

    Attributes:
      draws: source of each response to a prompt.
      loss: rollout -> one value per prompt, not reduced.
      annotation: what the loss reads from the annotator.
      trained: number of responses, from the first, whose log-probs the loss reads.
      average_decay: decay of the running average of parameters; None: no average.
      iteration: number of rollouts in an iteration. The loss's reference is then the policy at the
        start of the iteration, which may also sample; None: the frozen reference.
      anchor: weight of the frozen reference's log-probs in the loss's reference; the policy at the
        start of the iteration has the rest. Only with iterations.
      past: number of iterations, the current one included, from whose first policies the loss's
        reference is mixed; each has `past_decay` times the weight of the one after it.
      past_decay: see `past`.
      extragradient: whether steps come in pairs from the same parameters: the first step is undone
        after the second one's samples are drawn.
      updates: number of passes over each rollout.
      minibatches: number of random parts of a rollout in each pass, with one update each.
      per_token: whether the loss is a sum over tokens, which the step divides by their number,
        instead of a value per prompt.
      advantages: (samples scored by the sampling policy, rewards, values) -> advantages and returns
        per token, computed over the whole rollout before its updates. None: the loss reads rewards.
      critic: whether `advantages` read values; a value head is then trained with the policy. If
        not, values are 0 and returns are ignored.
      rescored: whether log-probs of the sampled tokens are computed again before the updates, at
        the precision of the updates; with `advantages` they always are.
      importance: whether the loss weighs tokens by `RolloutBatch.importance`, which corrects for
        top-k, top-p and min-p.
      resamples: number of further draws for prompts whose responses all have the same reward; those
        that remain have no weight.
      overlong: fraction of the longest length, at its end, within which a penalty on the reward
        grows linearly to 1.
    """

    draws: tuple[Draw, ...]
    loss: Callable[[Rollout], Float[Array, " prompts"]]
    annotation: Literal["preferences", "rewards", "none"]
    trained: int
    average_decay: float | None = None
    iteration: int | None = None
    anchor: float = 0.0
    past: int = 1
    past_decay: float = 1.0
    extragradient: bool = False
    updates: int = 1
    minibatches: int = 1
    per_token: bool = False
    advantages: Callable[[SampleLogProbs, Array, Array], tuple[Array, Array]] | None = None
    critic: bool = True
    rescored: bool = False
    importance: bool = False
    resamples: int = 0
    overlong: float = 0.0

    def __post_init__(self):
        if not 1 <= self.trained <= len(self.draws):
            raise UserError(f"trained: {self.trained} of {len(self.draws)} responses")
        for name in ("updates", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")
        if not 0 <= self.anchor <= 1 or (self.anchor and self.iteration is None):
            raise UserError(f"anchor: {self.anchor} is not in [0, 1], or there are no iterations")
        if self.past < 1 or (self.past > 1 and self.iteration is None):
            raise UserError(f"past: {self.past} is not positive, or there are no iterations")
        if not 0 < self.past_decay <= 1:
            raise UserError(f"past_decay: {self.past_decay} is not in (0, 1]")
        history = self.iteration is not None or self.average_decay is not None
        if self.extragradient and (history or self.updates * self.minibatches > 1):
            raise UserError("extragradient: has no average, no iterations and one update a rollout")
        if self.resamples < 0:
            raise UserError(f"resamples: {self.resamples} is negative")
        if self.annotation != "rewards" and (self.resamples or self.overlong):
            raise UserError("resamples, overlong: only for an algorithm on rewards")
        if not 0 <= self.overlong <= 1:
            raise UserError(f"overlong: {self.overlong} is not in [0, 1]")
        if self.iteration is not None and self.average_decay is not None:
            raise UserError("iteration: an algorithm has either an average or iterations")

    @property
    def scores_first(self) -> bool:
        """Whether a rollout is scored once before its updates."""
        return self.rescored or self.advantages is not None

    @property
    def has_critic(self) -> bool:
        """Whether a value head is trained with the policy."""
        return self.critic and self.advantages is not None

    @property
    def reads_data(self) -> bool:
        """Whether it learns from responses in the prompt data."""
        return any(draw.from_data for draw in self.draws)


def mixture_with_reference(beta: float) -> Draw:
    """The mixture of policy and reference, in which the reference has weight beta.

    Raises:
      UserError: the weight is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise UserError(f"beta: {beta} is not in [0, 1]")
    return Draw(policy=1.0 - beta, reference=beta)
