r"""Search in a deterministic Markov decision process with expensive rewards.

The value of a path :math:`s_0, a_0, s_1, r_1, a_1, \ldots` is the mean of its rewards without the
root's; the result is the last state of the best path.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxalign.errors import UserError

Value = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A state of the search tree."""

    number: int
    """Index in the order of the search; 0 is the root."""
    parent: int | None
    depth: int
    action: Any
    """The action that led here from the parent."""
    state: Any
    """State, as plain values."""
    reward: float
    """Reward of this state; NaN if there is none."""
    value: float
    """Value of the path from the root to here."""


@runtime_checkable
class World(Protocol):
    """The decision process; each method takes many states at a time."""

    def root(self) -> tuple[Any, float]:
        """The first state and its reward."""
        ...

    def satisfied(self, node: Node) -> bool:
        """Whether a state is good enough to stay unchanged."""
        ...

    def actions(self, paths: Sequence[Sequence[Node]], number: int) -> list[list[Any]]:
        """Up to `number` actions for the last node of each path; one for a satisfied node."""
        ...

    def move(self, steps: Sequence[tuple[Sequence[Node], Any]]) -> list[tuple[Any, float]]:
        """The state after each (path, action), and its reward."""
        ...


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The tree of a search, and its best path."""

    nodes: Sequence[Node]
    """All nodes, by number."""
    best: int
    """Number of the last node of the best path."""
    candidates: Sequence[int]
    """Numbers of the last nodes of the paths that reached the end, the best first."""

    def path(self, number: int) -> list[Node]:
        """The nodes from the root to a node, both included."""
        return path_to(self.nodes, number)


def path_to(nodes: Sequence[Node], number: int | None) -> list[Node]:
    """The nodes from the root to a node, both included."""
    path = []
    while number is not None:
        path.append(nodes[number])
        number = nodes[number].parent
    return path[::-1]


Watch = Callable[[Sequence[Node]], None]


class _Tree:
    """The nodes of a search, and their expansion."""

    def __init__(self, world: World, value: Value, watch: Watch | None):
        self.world, self.value, self.watch = world, value, watch
        state, reward = world.root()
        self.nodes = [
            Node(number=0, parent=None, depth=0, action=None, state=state, reward=reward, value=0.0)
        ]
        self._report()

    def _report(self) -> None:
        if self.watch is not None:
            self.watch(self.nodes)

    def expand(self, parents: Sequence[int], actions: Sequence[Sequence[Any]]) -> list[int]:
        """Add the children of all parents; returns the numbers of those with a reward."""
        paths = [path_to(self.nodes, number) for number in parents]
        steps = [(path, action) for path, own in zip(paths, actions, strict=True) for action in own]
        added = []
        for (path, action), (state, reward) in zip(steps, self.world.move(steps), strict=True):
            rewards = [node.reward for node in path[1:]] + [reward]
            self.nodes.append(
                Node(
                    number=len(self.nodes),
                    parent=path[-1].number,
                    depth=path[-1].depth + 1,
                    action=action,
                    state=state,
                    reward=reward,
                    value=reward if self.value == "last" else math.fsum(rewards) / len(rewards),
                )
            )
            if math.isfinite(reward):
                added.append(self.nodes[-1].number)
        self._report()
        if steps and not added:
            raise UserError(
                f"none of the {len(steps)} states at depth {paths[0][-1].depth + 1} has a reward: "
                "the evaluator's answers could not be read; name another evaluator"
            )
        return added

    def best_first(self, numbers: Sequence[int]) -> list[int]:
        """Sort nodes by value, the best first and ties in order."""
        return sorted(numbers, key=lambda number: (-self.nodes[number].value, number))


def beam_search(
    world: World,
    *,
    width: int = 2,
    actions: int = 3,
    depth: int = 19,
    more_depth: int = 10,
    value: Value = "mean",
    watch: Watch | None = None,
) -> SearchResult:
    r"""Keep the best paths of every level.

    .. math:: v(s_t) = \frac1t \sum_{i=1}^t r_i

    A satisfied state stays as it is; a level with one makes the search one level deeper, at most
    `more_depth` times.

    Args:
      world: decision process.
      width: number of paths that are kept; the paper's 2.
      actions: number of actions from each path; the paper's 3.
      depth: number of levels below the root; the released 20 include the root.
      more_depth: largest number of added levels; the paper's 10.
      value: value of a path: the mean of its rewards, or the last one.
      watch: called with all nodes after every level.

    Raises:
      UserError: a size is not positive, or no state of a level has a reward.

    References:
      Singla et al. 2024, arXiv:2411.08733, section 3 and its released settings.
    """
    for name, size in (("width", width), ("actions", actions), ("depth", depth)):
        if size < 1:
            raise UserError(f"{name}: {size} is not positive")
    tree = _Tree(world, value, watch)
    beam, deepest, level = [0], depth, 0
    while level < deepest:
        satisfied = any(world.satisfied(tree.nodes[number]) for number in beam)
        if satisfied and deepest < depth + more_depth:
            deepest += 1
        paths = [path_to(tree.nodes, number) for number in beam]
        reached = tree.expand(beam, world.actions(paths, actions))
        if not reached:
            break  # no actions are left
        beam = tree.best_first(reached)[:width]
        level += 1
    return SearchResult(nodes=tree.nodes, best=beam[0], candidates=beam)


def greedy_search(world: World, **options: Any) -> SearchResult:
    """`beam_search` with one path, whose value is its last reward.

    Args:
      world: decision process.
      **options: options of `beam_search`, without `width` and `value`.
    """
    return beam_search(world, width=1, value="last", **options)


def monte_carlo(
    world: World,
    *,
    paths: int = 6,
    depth: int = 1,
    value: Value = "mean",
    watch: Watch | None = None,
) -> SearchResult:
    """Follow independent paths, with one action at each state, and take the best.

    Args:
      world: decision process; `paths` actions of the root are requested, then one of each state.
      paths: number of paths.
      depth: number of levels; 1 takes actions of the root only.
      value: value of a path: the mean of its rewards, or the last one.
      watch: called with all nodes after every level.

    Raises:
      UserError: a size is not positive, or no state of a level has a reward.

    References:
      Singla et al. 2024, arXiv:2411.08733 (the baseline's name; its settings are ours).
    """
    for name, size in (("paths", paths), ("depth", depth)):
        if size < 1:
            raise UserError(f"{name}: {size} is not positive")
    tree = _Tree(world, value, watch)
    ends: list[int] = []
    front, number = [0], paths
    for _ in range(depth):
        actions = world.actions([path_to(tree.nodes, one) for one in front], number)
        reached = tree.expand(front, [own[:number] for own in actions])
        if not reached:
            break
        ends, front, number = reached, reached, 1
    ends = tree.best_first(ends or [0])
    return SearchResult(nodes=tree.nodes, best=ends[0], candidates=ends)
