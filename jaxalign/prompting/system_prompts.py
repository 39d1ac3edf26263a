"""The decision process of system prompts: a state is a prompt and how it did on a query."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxalign.backends import Backend, Decoding
from jaxalign.errors import UserError
from jaxalign.evaluation.single_scores import Evaluation, Reward
from jaxalign.prompting.composing import Composer, without_marks
from jaxalign.prompting.optimizers import PromptOptimizer
from jaxalign.prompting.search import Node

ENOUGH = 4.5
"""A mean score above it leaves the prompt as it is; the released code's."""


@dataclass(frozen=True, kw_only=True)
class PromptState:
    """A prompt's answer to a query, and what was said of it."""

    prompt: str
    query: str
    output: str
    evaluation: Evaluation


def state_of(fields: Mapping[str, Any]) -> PromptState:
    """From the plain values of a node."""
    return PromptState(**{**fields, "evaluation": Evaluation(**fields["evaluation"])})


class SystemPromptWorld:
    """A `World` whose actions are new prompts, tried on the next query.

    Level t asks query t of every prompt: rewards of one level are comparable.

    Args:
      model: whose prompt is searched.
      composer: puts prompt, examples and query together.
      reward: of its answers.
      optimizer: proposes prompts.
      queries: one for the root and one for each level.
      decoding: of the model; the composer's stops are added.
      first: the prompt of the root.

    References:
      Singla et al. 2024, arXiv:2411.08733, section 3.
    """

    def __init__(
        self,
        model: Backend,
        composer: Composer,
        reward: Reward,
        optimizer: PromptOptimizer,
        queries: Sequence[str],
        decoding: Decoding,
        *,
        first: str,
    ):
        if not queries:
            raise UserError("queries: there are none")
        self.model, self.composer, self.reward = model, composer, reward
        self.optimizer, self.queries, self.first = optimizer, list(queries), first
        stops = tuple(dict.fromkeys((*decoding.stop, *composer.stops)))
        self.decoding = replace(decoding, stop=stops)

    def root(self) -> tuple[Any, float]:
        """As in `World`."""
        [found] = self.tried([(self.first, self.queries[0])])
        return found

    def satisfied(self, node: Node) -> bool:
        """As in `World`: a mean score above 4.5."""
        return node.reward > ENOUGH

    def actions(self, paths: Sequence[Sequence[Node]], number: int) -> list[list[Any]]:
        """As in `World`; no action where there is no query left for its outcome."""
        found: list[list[Any]] = [[] for _ in paths]
        asked = []
        for at, path in enumerate(paths):
            if path[-1].depth + 1 >= len(self.queries):
                continue
            if self.satisfied(path[-1]) or not math.isfinite(path[-1].reward):
                found[at] = [path[-1].state["prompt"]]
            else:
                asked.append(at)
        histories = [[state_of(node.state) for node in paths[at]] for at in asked]
        proposals = self.optimizer(histories, number) if asked else []
        for at, some in zip(asked, proposals, strict=True):
            found[at] = list(some) or [paths[at][-1].state["prompt"]]
        return found

    def move(self, steps: Sequence[tuple[Sequence[Node], Any]]) -> list[tuple[Any, float]]:
        """As in `World`."""
        return self.tried([(prompt, self.queries[path[-1].depth + 1]) for path, prompt in steps])

    def tried(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, float]]:
        """States and rewards of (prompt, query)."""
        prompts = [self.composer.prompt(*pair) for pair in pairs]
        answers = [answer for [answer] in self.model.generate(prompts, self.decoding)]
        outputs = [without_marks(answer.text) for answer in answers]
        evaluations = [Evaluation(failure=answer.failure) for answer in answers]
        said = [at for at, answer in enumerate(answers) if not answer.failure]
        rewards = self.reward([pairs[at][1] for at in said], [outputs[at] for at in said])
        for at, evaluation in zip(said, rewards, strict=True):
            evaluations[at] = evaluation
        return [
            (
                asdict(
                    PromptState(prompt=prompt, query=query, output=output, evaluation=evaluation)
                ),
                evaluation.mean,
            )
            for (prompt, query), output, evaluation in zip(pairs, outputs, evaluations, strict=True)
        ]


def validate(
    world: SystemPromptWorld, prompts: Sequence[str], queries: Sequence[str]
) -> list[tuple[str, float, int]]:
    """Mean rewards of prompts on queries that the search has not seen, the best first.

    Args:
      world: of the search.
      prompts: candidates.
      queries: fresh ones.

    Returns:
      (prompt, mean, number of rewards) of each; NaN without rewards, and last.
    """
    prompts = list(dict.fromkeys(prompts))
    found = world.tried([(prompt, query) for prompt in prompts for query in queries])
    rows = []
    for at, prompt in enumerate(prompts):
        some = [reward for _, reward in found[at * len(queries) : (at + 1) * len(queries)]]
        known = [reward for reward in some if math.isfinite(reward)]
        rows.append((prompt, math.fsum(known) / len(known) if known else math.nan, len(known)))
    return sorted(rows, key=lambda row: -row[1] if math.isfinite(row[1]) else math.inf)
