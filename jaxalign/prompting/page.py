"""The tree of a search as a self-contained HTML file."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.files import write_text
from jaxalign.prompting.search import Node

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
details { border-left: 2px solid #ddd; padding-left: .8rem; margin: .2rem 0; }
details.best { border-color: #4c9f70; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem;
      font-size: 12px; margin: .3rem 0; }
b.good { color: #2f7d4f; }
small { color: #666; }
table { border-collapse: collapse; font-size: 13px; }
td { padding: .1rem .6rem; border-bottom: 1px solid #eee; vertical-align: top; }
"""


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
    children: dict[int | None, list[Node]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    marked = set(best)
    body: list[str] = []
    # A stack instead of recursion: chains may be longer than Python's limit.
    waiting: list[Node | None] = list(reversed(children.get(None, [])))
    while waiting:
        node = waiting.pop()
        if node is None:
            body.append("</details>")
            continue
        body.append(_opened(node, marked, nodes))
        waiting.append(None)
        waiting.extend(reversed(children.get(node.number, [])))
    lines = "<br>".join(map(html.escape, facts))
    write_text(
        path,
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{lines}</p>{''.join(body)}</body></html>\n",
    )


def _opened(node: Node, marked: set[int], nodes: Sequence[Node]) -> str:
    state: Mapping[str, Any] = node.state
    on_path = node.number in marked
    number = f"<b{' class=good' if on_path else ''}>{node.number}</b>"
    reward = f"{node.reward:.2f}" if math.isfinite(node.reward) else "no reward"
    query = html.escape(" ".join(str(state["query"]).split())[:90])
    unchanged = node.parent is not None and nodes[node.parent].state["prompt"] == state["prompt"]
    prompt = "as above" if unchanged else str(state["prompt"])
    evaluation = state["evaluation"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{score:.2f}</td>"
        f"<td>{html.escape(evaluation['reasons'].get(name, ''))}</td></tr>"
        for name, score in evaluation["scores"].items()
    )
    failure = f"<p>{html.escape(evaluation['failure'])}</p>" if evaluation["failure"] else ""
    return (
        f"<details{' class=best open' if on_path else ''}><summary>{number} "
        f"reward {reward}, path {node.value:.2f} <small>{query}</small></summary>"
        f"<small>system prompt</small><pre>{html.escape(prompt)}</pre>"
        f"<small>query</small><pre>{html.escape(str(state['query']))}</pre>"
        f"<small>answer</small><pre>{html.escape(str(state['output']))}</pre>"
        f"<table>{rows}</table>{failure}"
    )
