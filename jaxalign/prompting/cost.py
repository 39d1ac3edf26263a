"""The largest cost of a search, before anything is requested."""

from collections.abc import Mapping

from jaxalign.prompting.pareto import most_mutations


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
    budget: int = 150,
    pareto: int = 8,
    minibatch: int = 3,
) -> dict[str, int]:
    """The largest number of answers that a search requests in each role.

    Args:
      search: "beam", "greedy", "monte-carlo", "gepa" or "none".
      width: number of paths that are kept.
      actions: number of prompts proposed from each path.
      depth: number of levels below the root.
      more_depth: number of levels that may be added.
      examples: number of in-context examples to rewrite.
      iterations: number of rewritings of each example.
      validate: number of fresh queries on which the final prompt is chosen.
      dynamic: whether criteria are chosen for each query.
      budget: largest number of answers of the model in GEPA's search.
      pareto: number of Pareto queries of GEPA.
      minibatch: number of queries of a minibatch of GEPA.

    Returns:
      Role -> number of answers, without repeated attempts at unreadable answers.
    """
    if search == "none":
        levels = ends = tried = proposed = validate = 0
    elif search == "gepa":  # its levels count the queries, of which a root's is one
        levels, ends = pareto + depth + more_depth, width
        tried, proposed = budget, most_mutations(budget, pareto, minibatch)
    elif search == "monte-carlo":
        levels, parents, ends = depth, width * actions, width * actions
        tried, proposed = levels * parents, levels * parents
    else:
        width = width if search == "beam" else 1
        levels, ends = depth + more_depth, width
        tried = levels * width * actions
        proposed = levels * width * actions
    root = search not in ("none", "gepa")
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
"""Estimated prompt and completion tokens of an answer: our wording, with answers of 300 words."""


def estimate(calls: Mapping[str, int], prices: tuple[float, float]) -> tuple[int, int, float]:
    """Estimate the largest number of prompt tokens and completion tokens, and their price.

    Args:
      calls: answers by role, as from `most_calls`.
      prices: prices of a million prompt tokens and of a million completion tokens.
    """
    tokens = [sum(n * TOKENS[role][at] for role, n in calls.items()) for at in (0, 1)]
    return tokens[0], tokens[1], (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6
