"""The tree of a search as a self-contained HTML file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxalign.prompting.search import Node
from jaxalign.reporting.page import write_page


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """A node as the page shows it."""

    number: int
    best: bool
    reward: str
    value: str
    title: str
    prompt: str
    query: str
    output: str
    scores: Sequence[tuple[str, float, str]]
    failure: str


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Nodes inside one another."""

    template: ClassVar[str] = "tree.html"
    tree: Sequence[Node]
    best: frozenset[int]
    """Numbers of the nodes on the best path."""

    def nodes(self) -> Iterator[NodeView | None]:
        """Each node where it opens, and None where the last opened one closes."""
        children: dict[int | None, list[Node]] = {}
        for node in self.tree:
            children.setdefault(node.parent, []).append(node)
        # A stack instead of recursion: chains may be longer than Python's limit.
        waiting: list[Node | None] = list(reversed(children.get(None, [])))
        while waiting:
            node = waiting.pop()
            yield None if node is None else self._view(node)
            if node is not None:
                waiting.append(None)
                waiting.extend(reversed(children.get(node.number, [])))

    def _view(self, node: Node) -> NodeView:
        state, parent = node.state, node.parent
        evaluation: Any = state["evaluation"]
        unchanged = parent is not None and self.tree[parent].state["prompt"] == state["prompt"]
        return NodeView(
            number=node.number,
            best=node.number in self.best,
            reward=f"{node.reward:.2f}" if math.isfinite(node.reward) else "no reward",
            value=f"{node.value:.2f}",
            title=" ".join(str(state["query"]).split())[:90],
            prompt="as above" if unchanged else str(state["prompt"]),
            query=str(state["query"]),
            output=str(state["output"]),
            scores=[
                (name, score, evaluation["reasons"].get(name, ""))
                for name, score in evaluation["scores"].items()
            ],
            failure=evaluation["failure"],
        )


def write_tree(
    title: str, facts: Sequence[str], nodes: Sequence[Node], best: Sequence[int], path: Path
) -> None:
    """Write the page.

    Args:
      title: heading.
      facts: lines below the heading.
      nodes: nodes of a search in `SystemPromptWorld`, by number.
      best: numbers of the nodes on the best path, which are shown open.
      path: HTML file.
    """
    write_page(title, facts, [Tree(tree=nodes, best=frozenset(best))], path)
