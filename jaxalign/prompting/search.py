r"""Search in a deterministic Markov decision process whose rewards cost a call.

A path :math:`s_0, a_0, s_1, r_1, a_1, \ldots` is worth the mean of its rewards, the root's left
out; the answer is the last state of the best path.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxalign.errors import UserError

Value = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A state that was reached."""

    number: int
    """In the order of reaching; 0 is the root."""
    parent: int | None
    depth: int
    action: Any
    """What led here from the parent."""
    state: Any
    """Plain values."""
    reward: float
    """Of this state; NaN where none could be had."""
    value: float
    """Of the path from the root to here."""


@runtime_checkable
class World(Protocol):
    """The decision process; everything is asked for many states at a time."""

    def root(self) -> tuple[Any, float]:
        """The first state and its reward."""
        ...

    def satisfied(self, node: Node) -> bool:
        """Whether a state is so good that its action is to stay as it is."""
        ...

    def actions(self, paths: Sequence[Sequence[Node]], number: int) -> list[list[Any]]:
        """Actions for the last node of each path, up to `number`; from satisfied ones just one."""
        ...

    def move(self, steps: Sequence[tuple[Sequence[Node], Any]]) -> list[tuple[Any, float]]:
        """The state after an action at the end of a path, and its reward."""
        ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """The end of a search."""

    nodes: Sequence[Node]
    """All, by number."""
    best: int
    """The last node of the best path."""
    candidates: Sequence[int]
    """Last nodes of the paths that reached the end, the best first."""

    def path(self, number: int) -> list[Node]:
        """From the root to a node."""
        return path_to(self.nodes, number)


def path_to(nodes: Sequence[Node], number: int | None) -> list[Node]:
    """From the root to a node, both included."""
    path = []
    while number is not None:
        path.append(nodes[number])
        number = nodes[number].parent
    return path[::-1]


Watch = Callable[[Sequence[Node]], None]


class _Tree:
    """Nodes so far, and how they are added."""

    def __init__(self, world: World, value: Value, watch: Watch | None):
        self.world, self.value, self.watch = world, value, watch
        state, reward = world.root()
        self.nodes = [
            Node(number=0, parent=None, depth=0, action=None, state=state, reward=reward, value=0.0)
        ]
        self._told()

    def _told(self) -> None:
        if self.watch is not None:
            self.watch(self.nodes)

    def expand(self, parents: Sequence[int], actions: Sequence[Sequence[Any]]) -> list[int]:
        """Children of all parents; those without a reward are kept in the tree, not returned."""
        paths = [path_to(self.nodes, number) for number in parents]
        steps = [
            (path, action) for path, some in zip(paths, actions, strict=True) for action in some
        ]
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
        self._told()
        if steps and not added:
            raise UserError(
                f"none of the {len(steps)} states at depth {paths[0][-1].depth + 1} has a reward: "
                "the evaluator's answers could not be read; name another --evaluator"
            )
        return added

    def best_first(self, numbers: Sequence[int]) -> list[int]:
        """By value; of equal ones the earlier first."""
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
) -> Found:
    r"""Keep the best paths of every level.

    .. math:: v(s_t) = \frac1t \sum_{i=1}^t r_i

    A level with a satisfied state, which only goes on as it is, makes the search a level deeper,
    at most `more_depth` times.

    Args:
      world: what is searched.
      width: paths that are kept; the paper's 2.
      actions: from each of them; the paper's 3.
      depth: levels below the root; the released 20, which count the root.
      more_depth: levels that may be added; the paper's 10.
      value: of a path: the mean of its rewards, or the last one.
      watch: told all nodes after every level.

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
    return Found(nodes=tree.nodes, best=beam[0], candidates=beam)


def greedy_search(world: World, **options: Any) -> Found:
    """`beam_search` with one path, worth its last reward: the best child goes on.

    Args:
      world: what is searched.
      **options: of `beam_search`, without `width` and `value`.
    """
    return beam_search(world, width=1, value="last", **options)


def monte_carlo(
    world: World,
    *,
    paths: int = 6,
    depth: int = 1,
    value: Value = "mean",
    watch: Watch | None = None,
) -> Found:
    """Independent paths, one action at each state; the best one is taken.

    Args:
      world: what is searched; it is asked for `paths` actions of the root, then one of each state.
      paths: how many.
      depth: levels; 1: actions of the root alone.
      value: of a path.
      watch: told all nodes after every level.

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
        asked = world.actions([path_to(tree.nodes, one) for one in front], number)
        reached = tree.expand(front, [some[:number] for some in asked])
        if not reached:
            break
        ends, front, number = reached, reached, 1
    ends = tree.best_first(ends or [0])
    return Found(nodes=tree.nodes, best=ends[0], candidates=ends)
