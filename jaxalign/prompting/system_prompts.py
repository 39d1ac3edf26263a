"""The decision process of system prompts: a state is a prompt with its result on a query."""

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
"""A prompt with a larger mean score stays unchanged; the released code's."""


@dataclass(frozen=True, kw_only=True)
class PromptState:
    """A prompt's answer to a query, and its evaluation."""

    prompt: str
    query: str
    output: str
    evaluation: Evaluation


def state_of(fields: Mapping[str, Any]) -> PromptState:
    """A state from the plain values of a node."""
    return PromptState(**{**fields, "evaluation": Evaluation(**fields["evaluation"])})


class SystemPromptWorld:
    """A `World` whose actions are new prompts, tried on the next query.

    All prompts of a level are tried on the same query, so their rewards are comparable.

    Args:
      model: model to find a prompt for.
      composer: composes prompt, examples and query.
      reward: reward of the model's answers.
      optimizer: proposes prompts.
      queries: one for the root and one for each level.
      decoding: decoding of the model; the composer's stop strings are added.
      first: prompt of the root.

    Raises:
      UserError: there are no queries.

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
        self.rewarded = 0
        """Number of answers so far, from the model or stored."""

    def root(self) -> tuple[Any, float]:
        """As in `World`."""
        [state] = self.tried([(self.first, self.queries[0])])
        return state

    def satisfied(self, node: Node) -> bool:
        """As in `World`: a mean score above 4.5."""
        return node.reward > ENOUGH

    def actions(self, paths: Sequence[Sequence[Node]], number: int) -> list[list[Any]]:
        """As in `World`; no action if no query is left to try it on."""
        actions: list[list[Any]] = [[] for _ in paths]
        open_paths = []
        for at, path in enumerate(paths):
            if path[-1].depth + 1 >= len(self.queries):
                continue
            if self.satisfied(path[-1]) or not math.isfinite(path[-1].reward):
                actions[at] = [path[-1].state["prompt"]]
            else:
                open_paths.append(at)
        histories = [[state_of(node.state) for node in paths[at]] for at in open_paths]
        proposals = self.optimizer(histories, number) if open_paths else []
        for at, prompts in zip(open_paths, proposals, strict=True):
            actions[at] = list(prompts) or [paths[at][-1].state["prompt"]]
        return actions

    def move(self, steps: Sequence[tuple[Sequence[Node], Any]]) -> list[tuple[Any, float]]:
        """As in `World`."""
        return self.tried([(prompt, self.queries[path[-1].depth + 1]) for path, prompt in steps])

    def tried(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Any, float]]:
        """States and rewards of each (prompt, query)."""
        prompts = [self.composer.prompt(*pair) for pair in pairs]
        self.rewarded += len(pairs)
        answers = [answer for [answer] in self.model.generate(prompts, self.decoding)]
        outputs = [without_marks(answer.text) for answer in answers]
        evaluations = [Evaluation(failure=answer.failure) for answer in answers]
        answered = [at for at, answer in enumerate(answers) if not answer.failure]
        rewards = self.reward([pairs[at][1] for at in answered], [outputs[at] for at in answered])
        for at, evaluation in zip(answered, rewards, strict=True):
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


class PromptCandidates:
    """A `ReflectiveWorld` of system prompts; the optimizer reads the traces of a minibatch.

    Args:
      world: its model, reward and optimizer are used, and its queries by number.
    """

    def __init__(self, world: SystemPromptWorld):
        self.world = world

    def first(self) -> str:
        """As in `ReflectiveWorld`."""
        return self.world.first

    def rollouts(self, pairs: Sequence[tuple[Any, int]]) -> list[tuple[Any, float]]:
        """As in `ReflectiveWorld`; a trace is a `PromptState` as plain values."""
        queries = self.world.queries
        return self.world.tried([(prompt, queries[number]) for prompt, number in pairs])

    def reflect(self, candidate: Any, traces: Sequence[Any]) -> Any | None:
        """As in `ReflectiveWorld`; answers without an evaluation are not shown."""
        del candidate
        states = [state_of(trace) for trace in traces if not trace["evaluation"]["failure"]]
        proposals = self.world.optimizer([states], 1) if states else [[]]
        return proposals[0][0] if proposals[0] else None


def validate(
    world: SystemPromptWorld, prompts: Sequence[str], queries: Sequence[str]
) -> list[tuple[str, float, int]]:
    """Mean rewards of prompts on fresh queries, the best first.

    Args:
      world: decision process of the search.
      prompts: candidates.
      queries: queries that the search has not used.

    Returns:
      (prompt, mean, number of rewards) of each; the mean of a prompt without rewards is NaN, and
      it comes last.
    """
    prompts = list(dict.fromkeys(prompts))
    states = world.tried([(prompt, query) for prompt in prompts for query in queries])
    rows = []
    for at, prompt in enumerate(prompts):
        rewards = [reward for _, reward in states[at * len(queries) : (at + 1) * len(queries)]]
        known = [reward for reward in rewards if math.isfinite(reward)]
        rows.append((prompt, math.fsum(known) / len(known) if known else math.nan, len(known)))
    return sorted(rows, key=lambda row: -row[1] if math.isfinite(row[1]) else math.inf)
