"""What a search may cost, before anything is asked."""

from collections.abc import Mapping


def most_calls(
    *,
    search: str = "beam",
    width: int = 2,
    actions: int = 3,
    depth: int = 19,
    more_depth: int = 10,
    examples: int = 16,
    iterations: int = 5,
    validate: int = 8,
    dynamic: bool = True,
) -> dict[str, int]:
    """The most answers that a search asks of each role.

    Args:
      search: "beam", "greedy", "monte-carlo" or "none".
      width: paths that are kept.
      actions: from each of them.
      depth: levels below the root.
      more_depth: levels that may be added.
      examples: in-context examples to rewrite.
      iterations: of each of them.
      validate: fresh queries for the prompts at the end.
      dynamic: whether criteria are chosen for each query.

    Returns:
      Role -> answers; those that have to be asked again come on top.
    """
    if search == "none":
        levels = ends = tried = proposed = validate = 0
    elif search == "monte-carlo":
        levels, parents, ends = depth, width * actions, width * actions
        tried, proposed = levels * parents, levels * parents
    else:
        width = width if search == "beam" else 1
        levels, ends = depth + more_depth, width
        tried = levels * width * actions
        proposed = levels * width * actions
    root = search != "none"
    tried += root + validate * (ends + 1)  # the first prompt on the fresh queries, too
    rewrites = examples * iterations
    judged_examples = examples * (iterations + 1) if iterations else 0
    queries = levels + root + validate + (examples if iterations else 0)
    return {
        "model": tried,
        "evaluator": tried + judged_examples,
        "selector": queries if dynamic else 0,
        "optimizer": proposed,
        "rewriter": rewrites,
    }


TOKENS: Mapping[str, tuple[int, int]] = {
    "model": (1_500, 400),
    "evaluator": (1_000, 350),
    "selector": (500, 120),
    "optimizer": (1_500, 500),
    "rewriter": (900, 500),
}
"""Prompt and completion of an answer, about: our wording with answers of 300 words."""


def estimate(calls: Mapping[str, int], prices: tuple[float, float]) -> tuple[int, int, float]:
    """Prompt tokens, completion tokens and their price, about and at most.

    Args:
      calls: from `most_calls`.
      prices: of a million prompt tokens, and of a million completion tokens.
    """
    tokens = [sum(n * TOKENS[role][at] for role, n in calls.items()) for at in (0, 1)]
    return tokens[0], tokens[1], (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6
